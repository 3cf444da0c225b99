package capture_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

var (
	drawID = rapid.Custom(func(t *rapid.T) uuid.UUID {
		id := uuid.UUID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "uuid"))
		id[6], id[8] = id[6]&0x0f|0x70, id[8]&0x3f|0x80
		return id
	})
	drawTime = rapid.Custom(func(t *rapid.T) time.Time {
		return time.Unix(rapid.Int64Range(1, 1<<33).Draw(t, "s"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns")).UTC()
	})
	drawRoute   = rapid.StringMatching(`[a-z0-9][a-z0-9_-]{0,31}`)
	drawIngress = rapid.StringMatching(`[A-Za-z0-9_-]{1,64}`)
	// Any byte that a client can get into a target.
	drawTarget = rapid.Custom(func(t *rapid.T) string {
		b := rapid.SliceOfN(rapid.Byte().Filter(func(b byte) bool { return b != ' ' && b != '\r' && b != '\n' }), 0, 40).Draw(t, "target")
		return "/" + string(b)
	})
	drawMethod = rapid.SampledFrom([]string{"POST", "PUT", "M-SEARCH", "post"})
	drawPolicy = rapid.Custom(func(t *rapid.T) capture.Policy {
		p := capture.DefaultPolicy()
		p.By = rapid.SampledFrom([]capture.CompletionBy{capture.ByResponse, capture.ByEvent}).Draw(t, "by")
		p.Processed = rapid.SampledFrom([]capture.StatusSet{"", "2xx", "2xx,3xx,404"}).Draw(t, "processed")
		p.Failed = rapid.SampledFrom([]capture.StatusSet{"", "5xx", "408,425,429,5xx"}).Draw(t, "failed")
		p.Timeout = time.Duration(rapid.Int64Range(1, int64(time.Hour)).Draw(t, "timeout"))
		p.Grace = time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "grace"))
		return p
	})
	drawRequest = rapid.Custom(func(t *rapid.T) *capture.Request {
		r := &capture.Request{
			ID: drawID.Draw(t, "id"), Route: drawRoute.Draw(t, "route"), Ingress: drawIngress.Draw(t, "ingress"),
			ReceivedAt: drawTime.Draw(t, "at"), Policy: drawPolicy.Draw(t, "policy"), OrderKey: string(rapid.SliceOf(rapid.Byte()).Draw(t, "key")),
			Head: []byte(drawMethod.Draw(t, "method") + " " + drawTarget.Draw(t, "target") + " HTTP/1.1\r\nHost: a\r\nX: \xff\x80\r\n\r\n"),
		}
		if rapid.Bool().Draw(t, "chunked") {
			r.Chunks, r.Size, r.SHA256 = rapid.IntRange(1, 1000).Draw(t, "chunks"), rapid.Int64Range(1, 1<<40).Draw(t, "size"), strings.Repeat("0a", 32)
		} else {
			r.Body = rapid.SliceOf(rapid.Byte()).Draw(t, "body")
			r.Size = int64(len(r.Body))
		}
		return r
	})
)

// header is what the publisher of a message makes of it.
func header(m capture.Message) capture.Header {
	return capture.Header{capture.HeaderID: {m.ID}, capture.HeaderCapture: {m.Capture}}
}

func TestCapturesComeBackAsTheyWent(t *testing.T) {
	var d capture.Decoder
	rapid.Check(t, func(t *rapid.T) {
		r := drawRequest.Draw(t, "request")
		m := r.Message()
		data := append(bytes.Clone(r.Head), r.Body...)
		// By way of the spool.
		record := append(m.AppendEnvelope(nil), data...)
		back, err := capture.ParseRecord(record)
		require.NoError(t, err)
		m.Data = data
		require.Equal(t, m, back)
		c, err := d.Decode(back.Subject, header(back), back.Data)
		require.NoError(t, err)
		require.Equal(t, r.ID, c.ID())
		if len(r.Body) == 0 {
			r.Body, c.Request.Body = nil, nil
		}
		require.Equal(t, r, c.Request)
		require.Equal(t, r.Target(), c.Request.Target())
	})
}

func TestChunksAndAbandonRecordsComeBack(t *testing.T) {
	var d capture.Decoder
	rapid.Check(t, func(t *rapid.T) {
		id, route, ingress := drawID.Draw(t, "id"), drawRoute.Draw(t, "route"), drawIngress.Draw(t, "ingress")
		chunk := &capture.Chunk{ID: id, Route: route, Ingress: ingress, Number: rapid.IntRange(0, 1<<30).Draw(t, "n"), Data: rapid.SliceOfN(rapid.Byte(), 1, 50).Draw(t, "data")}
		m := chunk.Message("POST")
		c, err := d.Decode(m.Subject, header(m), chunk.Data)
		require.NoError(t, err)
		require.Equal(t, capture.Captured{Chunk: chunk}, c)
		abandon := &capture.Abandon{ID: id, Route: route, Ingress: ingress}
		m = abandon.Message("m-search")
		c, err = d.Decode(m.Subject, header(m), nil)
		require.NoError(t, err)
		require.Equal(t, capture.Captured{Abandon: abandon}, c)
	})
}

func TestCapturesThatAreNone(t *testing.T) {
	r := &capture.Request{
		ID: uuid.Must(uuid.NewV7()), Route: "calls", Ingress: "a", ReceivedAt: at, Policy: capture.DefaultPolicy(),
		Head: []byte("POST / HTTP/1.1\r\n\r\n"), Body: []byte("abc"), Size: 3,
	}
	var d capture.Decoder
	for name, spoil := range map[string]func(m *capture.Message){
		"subject":       func(m *capture.Message) { m.Subject = "holdfast.requests" },
		"route":         func(m *capture.Message) { m.Subject = "holdfast.requests.UPPER.POST" },
		"id":            func(m *capture.Message) { m.ID = "x" },
		"no parameters": func(m *capture.Message) { m.Capture = "" },
		"kind":          func(m *capture.Message) { m.Capture = strings.Replace(m.Capture, "kind=request", "kind=odd", 1) },
		"size":          func(m *capture.Message) { m.Capture = strings.Replace(m.Capture, "size=3", "size=4", 1) },
		"negative size": func(m *capture.Message) { m.Capture = strings.Replace(m.Capture, "size=3", "size=-3", 1) },
		"time":          func(m *capture.Message) { m.Capture = strings.Replace(m.Capture, "at=", "at=x", 1) },
		"policy":        func(m *capture.Message) { m.Capture = strings.Replace(m.Capture, "by=response", "by=magic", 1) },
		"no policy":     func(m *capture.Message) { m.Capture, _, _ = strings.Cut(m.Capture, "; by=") },
		"ingress":       func(m *capture.Message) { m.Capture = strings.Replace(m.Capture, "ingress=a", "ingress=a.b", 1) },
		"cut":           func(m *capture.Message) { m.Data = m.Data[:len(m.Data)-1] },
		"head":          func(m *capture.Message) { m.Data = []byte("POST / HTTP/1.1\r\nabc") },
		"request line":  func(m *capture.Message) { m.Data = []byte("POST / / HTTP/1.1\r\n\r\nabc") },
		"old protocol":  func(m *capture.Message) { m.Data = []byte("POST / HTTP/1.0\r\n\r\nabc") },
	} {
		m := r.Message()
		m.Data = append(bytes.Clone(r.Head), r.Body...)
		_, err := d.Decode(m.Subject, header(m), m.Data)
		require.NoError(t, err)
		spoil(&m)
		_, err = d.Decode(m.Subject, header(m), m.Data)
		require.ErrorIs(t, err, capture.ErrMalformed, name)
	}
	m := r.Message()
	m.Capture = strings.Replace(m.Capture, "v=1", "v=2", 1)
	_, err := d.Decode(m.Subject, header(m), append(bytes.Clone(r.Head), r.Body...))
	require.ErrorIs(t, err, capture.ErrNewerVersion)
	_, err = capture.ParseRecord([]byte{2})
	require.ErrorIs(t, err, capture.ErrNewerVersion)
}

func TestOutcomesComeBackAsTheyWent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o := capture.Outcome{
			ID: drawID.Draw(t, "id"), Ingress: rapid.OneOf(rapid.Just(""), drawIngress).Draw(t, "ingress"),
			Attempt: capture.Attempt{
				Number: rapid.IntRange(1, 1<<30).Draw(t, "number"), Run: rapid.String().Draw(t, "run"), StartedAt: drawTime.Draw(t, "started"),
				Status: rapid.IntRange(0, 999).Draw(t, "status"), Error: rapid.String().Draw(t, "error"),
				Verdict: rapid.SampledFrom([]capture.Verdict{"", "processed", "failed", "rejected"}).Draw(t, "verdict"),
			},
		}
		if rapid.Bool().Draw(t, "ended") {
			o.Attempt.EndedAt = drawTime.Draw(t, "ended at")
		}
		data := o.AppendJSON(nil)
		require.True(t, json.Valid(data), "%s", data)
		require.NotContains(t, string(data), "\n")
		back, err := capture.DecodeOutcome(data)
		require.NoError(t, err)
		require.Equal(t, o, back)
		// Text that is not UTF-8 is mended, never an error.
		o.Attempt.Error = string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes"))
		_, err = capture.DecodeOutcome(o.AppendJSON(nil))
		require.NoError(t, err)
	})
}

func TestEventsComeBackAsTheyWent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		events := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) capture.Event {
			return capture.Event{
				ID: drawID.Draw(t, "id"), Outcome: rapid.SampledFrom([]capture.Verdict{"processed", "failed"}).Draw(t, "outcome"),
				Attempt: rapid.IntRange(1, 1<<30).Draw(t, "attempt"), Detail: rapid.String().Draw(t, "detail"),
			}
		}), 1, 5).Draw(t, "events")
		var lines, array []byte
		for i := range events {
			lines = append(events[i].AppendJSON(lines), '\n')
			array = append(events[i].AppendJSON(array), ',')
		}
		array = append(append([]byte("[ "), array[:len(array)-1]...), ']')
		for _, data := range [][]byte{lines, array} {
			back, err := capture.DecodeEvents(data, len(events))
			require.NoError(t, err)
			require.Equal(t, events, back)
			_, err = capture.DecodeEvents(data, len(events)-1)
			require.ErrorIs(t, err, capture.ErrMalformed)
		}
	})
}

func TestEventsThatAreNoneAreNamed(t *testing.T) {
	const id = `"0190a6b8-7c5e-7c5e-8c5e-0190a6b87c5e"`
	good := `{"id":` + id + `,"outcome":"processed","more":1}`
	for data, want := range map[string]capture.EventError{
		`{"outcome":"processed"}`:                                                        {Parameter: "id"},
		`{"id":"x","outcome":"processed"}`:                                               {Parameter: "id"},
		`{"id":"00000000-0000-0000-0000-000000000000","outcome":"failed"}`:               {Parameter: "id"},
		`{"id":7,"outcome":"processed"}`:                                                 {Parameter: "id"},
		`{"id":` + id + `}`:                                                              {Parameter: "outcome"},
		`{"id":` + id + `,"outcome":"rejected"}`:                                         {Parameter: "outcome"},
		good + `{"id":` + id + `,"outcome":"failed","attempt":0}`:                        {Index: 1, Parameter: "attempt"},
		`[` + good + `,` + good + `,{"id":` + id + `,"outcome":"failed","attempt":"1"}]`: {Index: 2, Parameter: "attempt"},
		`{"id":` + id + `,"outcome":"failed","v":2}`:                                     {Parameter: "v"},
		`{"id":` + id + `,"outcome":"failed","detail":"` + strings.Repeat("x", capture.MaxDetailBytes+1) + `"}`: {Parameter: "detail"},
		`nonsense`: {},
	} {
		_, err := capture.DecodeEvents([]byte(data), 10)
		require.ErrorIs(t, err, capture.ErrMalformed, data)
		var e *capture.EventError
		require.ErrorAs(t, err, &e, data)
		require.Equal(t, want.Index, e.Index, data)
		require.Equal(t, want.Parameter, e.Parameter, data)
		require.NotEmpty(t, e.Reason)
	}
	for _, data := range []string{"", " \n", "[", "[" + good, "[" + good + "] x", "[" + good + ",]"} {
		_, err := capture.DecodeEvents([]byte(data), 10)
		require.ErrorIs(t, err, capture.ErrMalformed, data)
	}
	events, err := capture.DecodeEvents([]byte("[]"), 10)
	require.NoError(t, err)
	require.Empty(t, events)
}

func TestWordsAndHeartbeatsComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := capture.Word{Start: rapid.StringMatching(`[0-9a-f]{1,32}`).Draw(t, "start")}
		for range rapid.IntRange(1, 4).Draw(t, "ranges") {
			from := rapid.Uint64().Draw(t, "from")
			w.Released = append(w.Released, [2]uint64{from, max(from, rapid.Uint64().Draw(t, "to"))})
		}
		back, err := capture.DecodeWord(w.Encode())
		require.NoError(t, err)
		require.Equal(t, w, back)
		ref := capture.SpoolRef{Ingress: drawIngress.Draw(t, "ingress"), Start: w.Start, Index: w.Released[0][0]}
		got, ok := capture.ParseSpoolRef(capture.Header{capture.HeaderSpool: {ref.String()}})
		require.True(t, ok)
		require.Equal(t, ref, got)
		h := capture.Heartbeat{Ingress: ref.Ingress, Start: w.Start, Now: drawTime.Draw(t, "now"), Unreleased: 2}
		waited := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "waited"))
		h.OldestUnreleased = h.Now.Add(-waited)
		data, err := h.Encode()
		require.NoError(t, err)
		beat, err := capture.DecodeHeartbeat(data)
		require.NoError(t, err)
		require.Equal(t, h, beat)
		require.Equal(t, waited, beat.UnreleasedFor())
	})
}

func TestPoliciesComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPolicy.Draw(t, "policy")
		back, err := capture.ParsePolicy(p.String())
		require.NoError(t, err)
		require.Equal(t, p, back)
	})
}

func FuzzDecodeCapture(f *testing.F) {
	r := &capture.Request{
		ID: uuid.MustParse("0190a6b8-7c5e-7c5e-8c5e-0190a6b87c5e"), Route: "calls", Ingress: "a", ReceivedAt: at, OrderKey: "k;=", Policy: capture.DefaultPolicy(),
		Head: []byte("POST /a?b HTTP/1.1\r\nHost: a\r\n\r\n"), Body: []byte("abc"), Size: 3,
	}
	m := r.Message()
	f.Add(m.Subject, m.ID, m.Capture, append(bytes.Clone(r.Head), r.Body...))
	r.Body, r.Chunks, r.SHA256 = nil, 2, strings.Repeat("0", 64)
	m = r.Message()
	f.Add(m.Subject, m.ID, m.Capture, r.Head)
	m = (&capture.Chunk{ID: r.ID, Route: "calls", Ingress: "a", Number: 1}).Message("POST")
	f.Add(m.Subject, m.ID, m.Capture, []byte("x"))
	m = (&capture.Abandon{ID: r.ID, Route: "calls", Ingress: "a"}).Message("POST")
	f.Add(m.Subject, m.ID, m.Capture, []byte(nil))
	f.Fuzz(func(t *testing.T, subject, id, params string, data []byte) {
		var d capture.Decoder
		c, err := d.Decode(subject, header(capture.Message{ID: id, Capture: params}), data)
		if err != nil {
			if !errorIsOurs(err) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		switch {
		case c.Request != nil:
			// What is accepted can be sent again, and is the same then.
			m := c.Request.Message()
			again, err := d.Decode(m.Subject, header(m), append(bytes.Clone(c.Request.Head), c.Request.Body...))
			require.NoError(t, err)
			if at := again.Request.ReceivedAt; !at.Equal(c.Request.ReceivedAt) {
				t.Fatalf("%s is not %s", at, c.Request.ReceivedAt)
			}
			again.Request.ReceivedAt = c.Request.ReceivedAt
			require.Equal(t, c.Request, again.Request)
		case c.Chunk != nil:
			m := c.Chunk.Message("POST")
			again, err := d.Decode(m.Subject, header(m), c.Chunk.Data)
			require.NoError(t, err)
			require.Equal(t, c, again)
		}
	})
}

func errorIsOurs(err error) bool {
	return err != nil && (strings.Contains(err.Error(), capture.ErrMalformed.Error()) || strings.Contains(err.Error(), capture.ErrNewerVersion.Error()))
}

func FuzzDecodeEvents(f *testing.F) {
	for _, seed := range []string{
		`{"id":"0190a6b8-7c5e-7c5e-8c5e-0190a6b87c5e","outcome":"processed"}`, "[]", "{}", "null", "[null]", `{"id":null}`,
		"{\"id\":\"0190a6b8-7c5e-7c5e-8c5e-0190a6b87c5e\",\"outcome\":\"failed\",\"attempt\":2,\"detail\":\"x\"}\n\n{}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		events, err := capture.DecodeEvents(data, 5)
		if err != nil {
			require.ErrorIs(t, err, capture.ErrMalformed)
			require.Empty(t, events)
			return
		}
		require.LessOrEqual(t, len(events), 5)
		for i := range events {
			again, err := capture.DecodeEvents(events[i].AppendJSON(nil), 1)
			require.NoError(t, err)
			require.Equal(t, events[i:i+1], again)
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(capture.Message{Subject: "s", ID: "i", Capture: "c"}.AppendEnvelope(nil), "data"...))
	f.Add([]byte{1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, record []byte) {
		m, err := capture.ParseRecord(record)
		if err != nil {
			require.True(t, errorIsOurs(err))
			return
		}
		again, err := capture.ParseRecord(append(m.AppendEnvelope(nil), m.Data...))
		require.NoError(t, err)
		require.Equal(t, m, again)
	})
}

func FuzzDecodeOutcome(f *testing.F) {
	o := capture.Outcome{ID: uuid.MustParse("0190a6b8-7c5e-7c5e-8c5e-0190a6b87c5e"), Ingress: "a", Attempt: capture.Attempt{Number: 1, StartedAt: at, EndedAt: at, Status: 503, Error: "x\n", Verdict: capture.Failed}}
	f.Add(o.AppendJSON(nil))
	f.Add([]byte(`{"v":2,"id":"0190a6b8-7c5e-7c5e-8c5e-0190a6b87c5e","attempt":1}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := capture.DecodeOutcome(data)
		if err != nil {
			require.True(t, errorIsOurs(err))
			return
		}
		again, err := capture.DecodeOutcome(o.AppendJSON(nil))
		require.NoError(t, err)
		require.True(t, o.Attempt.StartedAt.Equal(again.Attempt.StartedAt))
		require.True(t, o.Attempt.EndedAt.Equal(again.Attempt.EndedAt))
		again.Attempt.StartedAt, again.Attempt.EndedAt = o.Attempt.StartedAt, o.Attempt.EndedAt
		require.Equal(t, o, again)
	})
}

func FuzzDecodeWord(f *testing.F) {
	f.Add(capture.Word{Start: "ab", Released: [][2]uint64{{1, 2}, {7, 7}}}.Encode())
	f.Add([]byte(`{"start":"","released":[[1,1]]}`))
	f.Add([]byte(`{"start":"a","released":[[2,1]]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		w, err := capture.DecodeWord(data)
		if err != nil {
			require.ErrorIs(t, err, capture.ErrMalformed)
			return
		}
		for _, r := range w.Released {
			require.LessOrEqual(t, r[0], r[1])
		}
		if len(w.Released) == 0 {
			return
		}
		again, err := capture.DecodeWord(w.Encode())
		require.NoError(t, err)
		require.Equal(t, w, again)
	})
}
