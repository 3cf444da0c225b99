package e2e_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/pkg/capture"
)

// poison puts into both streams what nobody can take, and gives how many
// messages of each kind must end up aside, and a word of their reasons.
func (w *world) poison(js jetstream.JetStream) (kinds map[string]int, reasons []string) {
	id := func() string { return uuid.Must(uuid.NewV7()).String() }
	good := "v=1; kind=request; at=2026-01-02T03:04:05Z; ingress=ingress-1; size=0; " + capture.DefaultPolicy().String()
	head := "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"

	w.cli("pub", "holdfast.requests.default.POST", "garbage")
	w.publish(js, "holdfast.requests.default.POST", []byte("\x00\xff\xfe"), capture.HeaderID, "no uuid", capture.HeaderCapture, good)
	w.publish(js, "holdfast.requests.default.POST", []byte(head), capture.HeaderID, id(), capture.HeaderCapture, strings.Replace(good, "v=1", "v=9", 1))
	w.publish(js, "holdfast.requests.default.POST", []byte(head+"more than announced"), capture.HeaderID, id(), capture.HeaderCapture, good)
	w.publish(js, "holdfast.requests.nothing", []byte(head), capture.HeaderID, id(), capture.HeaderCapture, good)
	w.publish(js, "holdfast.requests.default.POST", nil, capture.HeaderID, id(), capture.HeaderCapture, "v=1; kind=chunk; ingress=ingress-1; n=-1")
	// A body that is not the one which its head announced.
	r := capture.Request{
		ID: uuid.Must(uuid.NewV7()), Route: "default", Ingress: "ingress-1", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
		Head: []byte("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"), Size: 4, Chunks: 1,
	}
	sum := sha256.Sum256([]byte("this"))
	r.SHA256 = hex.EncodeToString(sum[:])
	chunk := (&capture.Chunk{ID: r.ID, Route: "default", Ingress: "ingress-1", Number: 0}).Message("POST")
	w.publish(js, chunk.Subject, []byte("that"), capture.HeaderID, chunk.ID, capture.HeaderCapture, chunk.Capture)
	w.publishRequest(js, &r)

	w.cli("pub", "holdfast.completions.default.outcome", "garbage")
	w.publish(js, "holdfast.completions.default.outcome", fmt.Appendf(nil, `{"v":9,"id":%q,"attempt":1}`, id()))
	w.publish(js, "holdfast.completions.default.event", []byte(`{"outcome":"processed"}`))
	w.publish(js, "holdfast.completions.default.event", fmt.Appendf(nil, `{"id":%q,"outcome":"maybe"}`, id()))
	w.publish(js, "holdfast.completions.default.event", nil)
	w.publish(js, "holdfast.completions.default.other", []byte("x"))
	return map[string]int{"capture": 7, "completion": 6, "incomplete": 1}, []string{"newer version", "outcome", "UUID", "bytes"}
}

// a message that some part cannot take | nothing | set aside with the reason,
// visible, counted; never blocks what comes after it.
func TestFailureOfAMessage(t *testing.T) {
	both(t, nil, func(t *testing.T, w *world) {
		js := w.jetStream()
		before := w.sends(3, http.StatusCreated)
		kinds, reasons := w.poison(js)
		after := w.sends(3, http.StatusCreated)
		w.replayed(append(before, after...), 1)
		w.awaitPassed(js)

		found := map[string]int{}
		var texts strings.Builder
		for _, a := range w.asides() {
			found[a.Kind]++
			require.NotEmpty(t, a.Reason)
			require.NotEmpty(t, a.Subject)
			texts.WriteString(a.Reason + "\n")
		}
		require.Equal(t, kinds, found, texts.String())
		for _, r := range reasons {
			require.Contains(t, texts.String(), r)
		}
		for kind, n := range kinds {
			require.Eventually(t, func() bool {
				return w.metric(harness.Recorder, fmt.Sprintf("holdfast_aside{kind=%q}", kind)) == float64(n)
			}, patience, 20*time.Millisecond, "the metric counts %d of kind %s", n, kind)
		}
		w.awaitSpool()
		w.nothingLeft()
	})
}

// a record that the broker refuses for good | nothing | set aside by the
// ingress, and what comes after it goes on.
func TestFailureOfARecord(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	config := filepath.Join(dir, "nats.conf")
	require.NoError(t, os.WriteFile(config, []byte("max_payload: 64KB\n"), 0o600))
	w := prepare(t, harness.Distributed, dir, nil)
	require.NoError(t, w.Start(t.Context()))
	before := w.sends(2, http.StatusCreated)

	// An ingress does not start with a broker that takes so little: this one comes
	// back so.
	w.Kill(harness.NATS)
	w.NATSArgs("-c", config)
	require.NoError(t, w.Start(t.Context(), harness.NATS))
	require.Eventually(t, func() bool {
		resp, err := http.Get(w.OpsURL(harness.Ingress) + "/readyz")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return err == nil && resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(text), "max_payload")
	}, patience, 20*time.Millisecond)
	oversize := w.sendBody(strings.Repeat("x", 100<<10))
	w.answered(oversize, http.StatusCreated)
	after := w.sends(2, http.StatusCreated)
	w.replayed(append(before, after...), 1)

	require.Eventually(t, func() bool { return w.metric(harness.Ingress, "holdfast_spool_aside") == 1 }, patience, 20*time.Millisecond)
	files, err := filepath.Glob(filepath.Join(w.SpoolDir(), "aside", "*"))
	require.NoError(t, err)
	require.Len(t, files, 1)
	text, err := os.ReadFile(files[0])
	require.NoError(t, err)
	first, _, _ := strings.Cut(string(text), "\n")
	require.Contains(t, first, "maximum payload exceeded")
	require.Contains(t, string(text), oversize.id)
	w.awaitSpool()
	w.nothingLeft()
}

// a row that some part cannot take | nothing | the others go on.
func TestFailureOfARow(t *testing.T) {
	both(t, nil, func(t *testing.T, w *world) {
		w.api.now(broken)
		all := w.sends(5, http.StatusInternalServerError)
		w.await("failed", ids(all)...)
		w.api.now(works)
		bad := uuid.MustParse(all[2].id)
		const where = " WHERE seq = (SELECT seq FROM requests WHERE id = ?)"
		w.alter("UPDATE payloads SET body = substr(body, 1, 3)"+where, bad[:])
		r := w.replay(3, "--max-attempts", "1")
		require.Equal(t, 4, r.Processed)
		require.Equal(t, 1, r.Left.Replayable)
		require.Len(t, w.api.of(all[2].id), 1, "half a request was sent")
		w.replayed(append(all[:2:2], all[3:]...), 2)

		w.alter("UPDATE payloads SET body = ?"+where, []byte("request 3\n"), bad[:])
		w.replay(0)
		w.replayed(all, 2)
	})
}
