package capture_test

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

func answered(a *capture.Answer) capture.Outcome {
	at := time.Date(2026, 11, 23, 7, 2, 45, 294824908, time.UTC)
	return capture.Outcome{ID: uuid.MustParse("01a20736-db2e-7ca5-96f9-15990b518809"), Ingress: "gw-1", Answer: a, Attempt: capture.Attempt{
		Number: 1, StartedAt: at, EndedAt: at.Add(time.Millisecond), Status: 201, Verdict: capture.Processed,
	}}
}

// TestAnOutcomeWithoutAnAnswerIsWhatItWas holds the record of a route that keeps
// no answers to its bytes.
func TestAnOutcomeWithoutAnAnswerIsWhatItWas(t *testing.T) {
	o := answered(nil)
	require.Equal(t, `{"id":"01a20736-db2e-7ca5-96f9-15990b518809","ingress":"gw-1","attempt":1,"started_at":"2026-11-23T07:02:45.294824908Z",`+
		`"ended_at":"2026-11-23T07:02:45.295824908Z","status":201,"verdict":"processed"}`, string(o.AppendJSON(nil)))
	require.Zero(t, capture.AnswerRoom(0))
}

func TestAnAnswerComesBackAsItWentIn(t *testing.T) {
	binary := make([]byte, 70<<10)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range binary {
		binary[i] = byte(rnd.UintN(256))
	}
	for name, body := range map[string][]byte{"empty": {}, "text": []byte(`{"a":"<&>"}` + "\n\x00"), "binary": binary, "largest": bytes.Repeat([]byte{0xff}, capture.MaxAnswer)} {
		t.Run(name, func(t *testing.T) {
			a := capture.NewAnswer("text/<&>; \"\xff\""+strings.Repeat("<", 1000), "gzip")
			a.Keep(body, capture.MaxAnswer)
			require.False(t, a.Cut)
			a.Cut = name == "binary"
			o, bare := answered(a), answered(nil)
			data := o.AppendJSON(nil)
			require.NotContains(t, string(data), "\n", "one line")
			require.LessOrEqual(t, len(data)-len(bare.AppendJSON(nil)), capture.AnswerRoom(max(len(body), 1)))
			got, err := capture.DecodeOutcomes(append(append(data, '\n'), data...))
			require.NoError(t, err)
			require.Equal(t, []capture.Outcome{o, o}, got)

			// A release that knows no answers reads the rest.
			var known map[string]json.RawMessage
			require.NoError(t, json.Unmarshal(data, &known))
			delete(known, "answer")
			rest, err := json.Marshal(known)
			require.NoError(t, err)
			old, err := capture.DecodeOutcome(rest)
			require.NoError(t, err)
			require.Equal(t, bare, old)
		})
	}
	large := answered(&capture.Answer{Body: make([]byte, capture.MaxAnswer+1)})
	_, err := capture.DecodeOutcome(large.AppendJSON(nil))
	require.ErrorIs(t, err, capture.ErrMalformed)
}

func TestAnAnswerIsCutWhereTheRouteKeepsNoMore(t *testing.T) {
	a := capture.NewAnswer("", "")
	a.Keep([]byte("hello"), 7)
	a.Keep([]byte("yo"), 7)
	require.Equal(t, capture.Answer{Body: []byte("helloyo")}, *a)
	a.Keep(nil, 7)
	require.False(t, a.Cut)
	a.Keep([]byte("u"), 7)
	a.Keep([]byte("v"), 7)
	require.Equal(t, capture.Answer{Body: []byte("helloyo"), Cut: true}, *a)
}
