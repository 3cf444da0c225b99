package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the ledger's write lock is taken with SQL

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/pkg/capture"
)

// patience bounds waits. What is waited for takes milliseconds, or a few seconds
// after a crash, on a busy machine longer.
const patience = 90 * time.Second

// bound gives a channel that is ready when patience is over.
func bound(t *testing.T) <-chan time.Time {
	timer := time.NewTimer(patience)
	t.Cleanup(func() { timer.Stop() })
	return timer.C
}

// settings are names without prefix, and values.
type settings map[string]string

// world is a deployment, the API behind it, and the client in front of it.
type world struct {
	*harness.System
	t      *testing.T
	api    *api
	client *http.Client
	next   int
}

// both runs a scenario on both topologies.
func both(t *testing.T, s settings, scenario func(t *testing.T, w *world)) {
	t.Parallel()
	for _, topology := range []harness.Topology{harness.Standalone, harness.Distributed} {
		t.Run(string(topology), func(t *testing.T) {
			t.Parallel()
			scenario(t, start(t, topology, s))
		})
	}
}

// distributed runs a scenario that kills one service.
func distributed(t *testing.T, s settings, scenario func(t *testing.T, w *world)) {
	t.Parallel()
	t.Run(string(harness.Distributed), func(t *testing.T) { scenario(t, start(t, harness.Distributed, s)) })
}

// start starts everything.
func start(t *testing.T, topology harness.Topology, s settings) *world {
	t.Helper()
	w := prepare(t, topology, t.TempDir(), s)
	require.NoError(t, w.Start(t.Context()))
	return w
}

// prepare starts the API only. The grace of requests is short, so that they can
// be replayed at once.
func prepare(t *testing.T, topology harness.Topology, dir string, s settings) *world {
	t.Helper()
	w := &world{t: t, api: newAPI(t)}
	var err error
	w.System, err = harness.New(harness.Options{
		Topology: topology, Bin: bin, NATSServer: natsServer, Dir: dir, Upstream: w.api.url(),
	})
	require.NoError(t, err)
	w.Set("UPSTREAM_TIMEOUT", "5s")
	w.Set("GRACE", "0s")
	w.Set("ACCESS_LOG", "all")
	for name, value := range s {
		w.Set(name, value)
	}
	// No connection is used twice: one that a fault has broken must not fail
	// the request after it.
	transport := &http.Transport{DisableKeepAlives: true}
	w.client = &http.Client{Transport: transport, Timeout: patience}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		if t.Failed() || os.Getenv("SHOW") != "" {
			w.showLogs(dir)
		}
		w.Close()
	})
	return w
}

func (w *world) showLogs(dir string) {
	logs, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	for _, path := range logs {
		text, _ := os.ReadFile(path)
		w.t.Logf("the end of %s:\n%s", filepath.Base(path), text[max(0, len(text)-6<<10):])
	}
}

// sent is a request, and what its client was told.
type sent struct {
	id, stored string
	status     int // 0: no whole answer
	header     http.Header
	body       string
	sha256     string // of the request's body, in hex
	err        error
}

// send sends one request with a body that no other has.
func (w *world) send(header ...string) sent {
	w.t.Helper()
	w.next++
	return w.sendBody(fmt.Sprintf("request %d\n", w.next), header...)
}

// sendBody sends one request. header is name, value, name, value.
func (w *world) sendBody(body string, header ...string) sent {
	w.t.Helper()
	r, err := http.NewRequest(http.MethodPost, w.IngressURL()+"/calls?x=%2F", strings.NewReader(body))
	require.NoError(w.t, err)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	sum := sha256.Sum256([]byte(body))
	s := sent{sha256: hex.EncodeToString(sum[:])}
	resp, err := w.client.Do(r)
	if err != nil {
		s.err = err
		return s
	}
	defer resp.Body.Close()
	s.id, s.stored, s.header = resp.Header.Get(capture.HTTPHeaderID), resp.Header.Get(capture.HTTPHeaderStored), resp.Header
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.err = err
		return s
	}
	s.status, s.body = resp.StatusCode, string(text)
	return s
}

// sends sends n requests that must be answered so, and stored.
func (w *world) sends(n, status int) []sent {
	w.t.Helper()
	all := make([]sent, n)
	for i := range all {
		all[i] = w.send()
		w.answered(all[i], status)
	}
	return all
}

// answered checks a whole answer to a stored request.
func (w *world) answered(s sent, status int) {
	w.t.Helper()
	require.NoError(w.t, s.err)
	require.Equal(w.t, status, s.status, s.body)
	require.Equal(w.t, "synced", s.stored)
	require.Len(w.t, s.id, 36)
}

func ids(all []sent) []string {
	list := make([]string, len(all))
	for i, s := range all {
		list[i] = s.id
	}
	return list
}

// request is what the read API says of one request.
type request struct {
	ID       string `json:"id"`
	State    string `json:"state"`
	Status   int    `json:"status"`
	Attempts []struct {
		Number    int       `json:"number"`
		Run       string    `json:"run"`
		StartedAt time.Time `json:"started_at"`
		Status    int       `json:"status"`
		Verdict   string    `json:"verdict"`
	} `json:"attempts"`
	Events []struct {
		Attempt int `json:"attempt"`
	} `json:"events"`
}

// look reads one request; ok is false when the read API does not know it, or is
// not there.
func (w *world) look(id string) (r request, ok bool) {
	err := harness.GetJSON(w.t.Context(), w.RecorderURL()+"/v1/requests/"+id, &r)
	return r, err == nil
}

// await waits until all the requests are in the state.
func (w *world) await(state string, ids ...string) {
	w.t.Helper()
	for _, id := range ids {
		var last request
		require.Eventuallyf(w.t, func() bool {
			last, _ = w.look(id)
			return last.State == state
		}, patience, 10*time.Millisecond, "request %s becomes %s", id, state)
	}
}

// replayable gives the ids that the read API says can be replayed.
func (w *world) replayable() []string { return w.list("state=replayable") }

// list gives the ids that a query of the read API selects.
func (w *world) list(query string) []string {
	w.t.Helper()
	found, err := w.Requests(w.t.Context(), query)
	require.NoError(w.t, err)
	list := []string{}
	for _, r := range found {
		list = append(list, r.ID)
	}
	return list
}

// awaitReplayable waits until exactly these can be replayed.
func (w *world) awaitReplayable(ids ...string) {
	w.t.Helper()
	if len(ids) == 0 {
		ids = []string{}
	}
	require.Eventually(w.t, func() bool {
		found, err := w.Requests(w.t.Context(), "state=replayable")
		return err == nil && len(found) == len(ids)
	}, patience, 10*time.Millisecond, "%d requests become replayable", len(ids))
	require.ElementsMatch(w.t, ids, w.replayable())
}

// report is what `replayer run --output json` prints.
type report struct {
	Sent      int    `json:"sent"`
	Processed int    `json:"processed"`
	End       string `json:"end"`
	Reason    string `json:"reason"`
	Left      struct {
		Replayable, Waiting, Quarantined, Rejected int
	} `json:"left"`
}

// replay runs `replayer run`, which must end with the exit code.
func (w *world) replay(code int, args ...string) report {
	w.t.Helper()
	got, r := w.run(args...)
	require.Equal(w.t, code, got, "%+v", r)
	return r
}

// run runs `replayer run` to its end, whatever that is.
func (w *world) run(args ...string) (code int, r report) {
	w.t.Helper()
	args = append([]string{"run", "--output", "json"}, args...)
	code, out, err := w.Replay(w.t.Context(), args...)
	require.NoError(w.t, err)
	if out != "" {
		require.NoError(w.t, json.Unmarshal([]byte(out), &r), out)
	}
	return code, r
}

// replayed checks that each request arrived so many times, always whole, with
// rising attempts, and that the API was not asked again after it had processed
// it; and that all are processed.
func (w *world) replayed(all []sent, arrivals int) {
	w.t.Helper()
	for _, s := range all {
		got := w.api.of(s.id)
		require.Len(w.t, got, arrivals, "arrivals of %s", s.id)
		for i, a := range got {
			require.Equal(w.t, s.sha256, a.SHA256)
			require.Equal(w.t, "/calls?x=%2F", a.Target)
			require.Equal(w.t, i > 0 || a.Replay != "", a.Replay != "")
			if i > 0 {
				require.Greater(w.t, a.Attempt, got[i-1].Attempt)
			}
		}
		w.await("processed", s.id)
	}
}

// nothingLeft checks that another replay would send nothing.
func (w *world) nothingLeft() {
	w.t.Helper()
	before := w.api.count()
	r := w.replay(0)
	require.Zero(w.t, r.Sent)
	require.Equal(w.t, before, w.api.count())
}

// metric reads a gauge of the process that plays the role.
func (w *world) metric(role, name string) float64 {
	v, err := w.Metric(w.t.Context(), role, name)
	if err != nil {
		return -1
	}
	return v
}

// awaitSpool waits until the spool holds nothing that nobody else has.
func (w *world) awaitSpool() {
	w.t.Helper()
	require.Eventually(w.t, func() bool { return w.metric(harness.Ingress, "holdfast_spool_unreleased") == 0 },
		patience, 10*time.Millisecond, "the spool is released")
}

// awaitHeard waits until the ledger knows the ingress by its heartbeat.
func (w *world) awaitHeard() {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		var stats struct{ Ingresses []struct{} }
		return harness.GetJSON(w.t.Context(), w.RecorderURL()+"/v1/stats", &stats) == nil && len(stats.Ingresses) == 1
	}, patience, 10*time.Millisecond, "the ingress is heard of")
}

// lockLedger holds the ledger's write lock until the returned function is called.
func (w *world) lockLedger() (unlock func()) {
	w.t.Helper()
	db, err := sql.Open("sqlite", "file:"+w.Ledger()+"?_pragma=busy_timeout(20000)")
	require.NoError(w.t, err)
	conn, err := db.Conn(w.t.Context())
	require.NoError(w.t, err)
	_, err = conn.ExecContext(w.t.Context(), "BEGIN IMMEDIATE")
	require.NoError(w.t, err)
	done := false
	unlock = func() {
		if done {
			return
		}
		done = true
		_, err := conn.ExecContext(context.Background(), "ROLLBACK")
		require.NoError(w.t, err)
		require.NoError(w.t, conn.Close())
		require.NoError(w.t, db.Close())
	}
	w.t.Cleanup(unlock)
	return unlock
}

// nats runs the stock nats command.
func (w *world) cli(args ...string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, natsCLI, append([]string{"--server", w.NATSURL()}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+w.t.TempDir())
	out, err := cmd.CombinedOutput()
	require.NoError(w.t, err, string(out))
	return string(out)
}

// onTerminal runs a command that wants a terminal, and gives what it shows.
func (w *world) onTerminal(name string, args ...string) string {
	w.t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(w.t, err)
	defer master.Close()
	require.NoError(w.t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	require.NoError(w.t, err)
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(w.t, err)
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "HOME="+w.t.TempDir(), "TERM=dumb")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	err = cmd.Start()
	require.NoError(w.t, errors.Join(err, terminal.Close()))
	shown, err := io.ReadAll(master)
	require.ErrorIs(w.t, err, unix.EIO) // this is how a terminal ends
	require.NoError(w.t, cmd.Wait(), string(shown))
	return string(shown)
}

// complete reports over HTTP that the API has processed a request, and returns
// nil once that is durable. The API's handlers call it.
func (w *world) complete(id string, attempt int) error {
	r, err := http.NewRequest(http.MethodPut, w.AckerURL()+"/v1/completions/"+id, strings.NewReader(fmt.Sprintf(`{"attempt":%d}`, attempt)))
	if err != nil {
		return err
	}
	resp, err := w.client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusAccepted {
		return fmt.Errorf("completion of %s: status %d", id, resp.StatusCode)
	}
	return nil
}

// ask sends a request to one of our own APIs.
func (w *world) ask(method, url, body string) (status int, text string) {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), method, url, strings.NewReader(body))
	require.NoError(w.t, err)
	resp, err := w.client.Do(r)
	require.NoError(w.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(w.t, err)
	return resp.StatusCode, string(b)
}

// jetStream connects to the broker as an operator would.
func (w *world) jetStream() jetstream.JetStream {
	w.t.Helper()
	nc, err := nats.Connect(w.NATSURL(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	require.NoError(w.t, err)
	w.t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	require.NoError(w.t, err)
	return js
}

// publish puts a message into a stream, as somebody does who is not Holdfast.
// header is name, value, name, value.
func (w *world) publish(js jetstream.JetStream, subject string, data []byte, header ...string) {
	w.t.Helper()
	m := &nats.Msg{Subject: subject, Data: data, Header: nats.Header{}}
	for i := 0; i < len(header); i += 2 {
		m.Header.Set(header[i], header[i+1])
	}
	_, err := js.PublishMsg(w.t.Context(), m)
	require.NoError(w.t, err)
}

// publishRequest puts a request into the stream by the gateway's own codec.
func (w *world) publishRequest(js jetstream.JetStream, r *capture.Request) {
	w.t.Helper()
	m := r.Message()
	w.publish(js, m.Subject, append(bytes.Clone(r.Head), r.Body...), capture.HeaderID, m.ID, capture.HeaderCapture, m.Capture)
}

// passed reports whether everything that a stream holds has been acknowledged.
func (w *world) passed(js jetstream.JetStream, streamName, durable string) bool {
	s, err := js.Stream(w.t.Context(), streamName)
	if err != nil {
		return false
	}
	c, err := s.Consumer(w.t.Context(), durable)
	return err == nil && c.CachedInfo().AckFloor.Stream == s.CachedInfo().State.LastSeq
}

// awaitPassed waits until recorder and acker have taken all there is.
func (w *world) awaitPassed(js jetstream.JetStream) {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		return w.passed(js, capture.RequestsStream, capture.RecorderDurable) && w.passed(js, capture.CompletionsStream, capture.AckerDurable)
	}, patience, 20*time.Millisecond, "recorder and acker have taken all there is")
}

// aside is a message that was set aside, as the read API tells.
type aside struct {
	Kind      string `json:"kind"`
	Reason    string `json:"reason"`
	Subject   string `json:"subject"`
	RequestID string `json:"request_id"`
}

func (w *world) asides() []aside {
	w.t.Helper()
	var list struct {
		Aside []aside `json:"aside"`
	}
	require.NoError(w.t, harness.GetJSON(w.t.Context(), w.RecorderURL()+"/v1/aside?limit=100", &list))
	return list.Aside
}

// alter changes the ledger's file behind Holdfast's back.
func (w *world) alter(statement string, args ...any) {
	w.t.Helper()
	db, err := sql.Open("sqlite", "file:"+w.Ledger()+"?_pragma=busy_timeout(20000)")
	require.NoError(w.t, err)
	defer db.Close()
	result, err := db.ExecContext(w.t.Context(), statement, args...)
	require.NoError(w.t, err)
	n, err := result.RowsAffected()
	require.NoError(w.t, err)
	require.Equal(w.t, int64(1), n, "rows altered")
}
