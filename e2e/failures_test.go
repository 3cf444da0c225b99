package e2e_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// The tests of this file are the rows of the design's failure table, in its
// order. Each says what fails, what the client sees, and what becomes of the
// request; then the fault is healed, and in the end the API has processed every
// request that was answered, and none twice by our doing.

// fault is a way in which an API fails.
type fault struct {
	name    string
	begin   func(t *testing.T, a *api)
	status  int // of the client's answer, 0: a broken one
	arrives int // requests that the API sees
	ours    bool
}

func does(b behaviour) func(*testing.T, *api) { return func(_ *testing.T, a *api) { a.now(b) } }

var apiFaults = []fault{
	{"down", func(_ *testing.T, a *api) { a.down() }, http.StatusBadGateway, 0, true},
	{"5xx", does(broken), http.StatusInternalServerError, 1, false},
	{"timeout", func(t *testing.T, a *api) { a.now(hangs(t.Context().Done())) }, http.StatusGatewayTimeout, 1, true},
	{"reset", does(resets), http.StatusBadGateway, 1, true},
	{"cut by length", does(sends("HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\nhalf")), http.StatusBadGateway, 1, true},
	{"cut in chunks", does(sends("HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")), 0, 1, false},
}

// API down, 5xx, timeout, reset, answer cut short | the API's error or our
// 502/504 | failed, replayable.
func TestFailureOfTheAPI(t *testing.T) {
	both(t, settings{"UPSTREAM_TIMEOUT": "2s"}, func(t *testing.T, w *world) {
		var all []sent
		arrivals := map[string]int{}
		for _, f := range apiFaults {
			f.begin(t, w.api)
			s := w.send()
			require.Equal(t, f.status, s.status, f.name)
			require.Equal(t, "synced", s.stored, f.name)
			switch {
			case f.status == 0:
				require.ErrorContains(t, s.err, "unexpected EOF", f.name)
			case f.ours:
				require.Equal(t, "application/problem+json", s.header.Get("Content-Type"), f.name)
				require.Contains(t, s.header.Get("Proxy-Status"), "holdfast; error=", f.name)
				require.Contains(t, s.body, s.id, f.name)
			default:
				require.Equal(t, fmt.Sprintf("the API says 500 to %s\n", s.id), s.body)
			}
			w.await("failed", s.id)
			arrivals[s.id] = f.arrives
			all = append(all, s)
			w.api.down()
			w.api.up()
		}
		w.awaitReplayable(ids(all)...)
		w.api.now(works)
		r := w.replay(0)
		require.Equal(t, len(all), r.Processed)
		for _, s := range all {
			w.replayed([]sent{s}, arrivals[s.id]+1)
		}
		w.nothingLeft()
	})
}

// The same | with `on_failure: accept`, 202 and the UUID | failed, replayable.
func TestFailureOfTheAPIAccepted(t *testing.T) {
	both(t, settings{"UPSTREAM_TIMEOUT": "2s", "ON_FAILURE": "accept"}, func(t *testing.T, w *world) {
		var all []sent
		arrivals := map[string]int{}
		for _, f := range apiFaults {
			f.begin(t, w.api)
			s := w.send()
			if f.status == 0 {
				// Its first part has gone out before it turns out to be cut short.
				require.ErrorContains(t, s.err, "unexpected EOF", f.name)
			} else {
				w.answered(s, http.StatusAccepted)
				require.Contains(t, s.body, s.id, f.name)
			}
			w.await("failed", s.id)
			arrivals[s.id] = f.arrives
			all = append(all, s)
			w.api.down()
			w.api.up()
		}
		w.awaitReplayable(ids(all)...)
		w.api.now(works)
		w.replay(0)
		for _, s := range all {
			w.replayed([]sent{s}, arrivals[s.id]+1)
		}
	})
}

// API answers 4xx | the answer | rejected: not replayed unless asked.
func TestFailureRejected(t *testing.T) {
	both(t, nil, func(t *testing.T, w *world) {
		w.api.now(refuses)
		all := w.sends(3, http.StatusUnprocessableEntity)
		w.await("rejected", ids(all)...)
		w.api.now(works)
		require.Empty(t, w.replayable())
		w.nothingLeft()
		require.Equal(t, len(all), w.api.count())

		r := w.replay(0, "--state", "rejected")
		require.Equal(t, len(all), r.Processed)
		w.replayed(all, 2)
	})
}

// API answers 2xx, dies before its completion event (`completion: event`) | the
// answer | received, replayable after its grace.
func TestFailureBeforeTheEvent(t *testing.T) {
	both(t, settings{"COMPLETION": "event", "GRACE": "1h"}, func(t *testing.T, w *world) {
		waiting := w.sends(2, http.StatusCreated)
		w.await("received", ids(waiting)...)
		r := w.replay(3) // not yet
		require.Equal(t, 2, r.Left.Waiting)
		require.Equal(t, 2, w.api.count())

		// From now on the grace is short.
		w.Set("GRACE", "1s")
		require.NoError(t, w.Stop(harness.Ingress))
		require.NoError(t, w.Start(t.Context(), harness.Ingress))
		late := w.sends(2, http.StatusCreated)
		w.await("received", ids(late)...)
		w.awaitReplayable(ids(late)...)
		require.Equal(t, 4, w.api.count())

		// The API sends its event with the replay.
		w.api.now(func(rw http.ResponseWriter, r *http.Request, a arrival) {
			works(rw, r, a)
			if err := w.complete(a.ID, a.Attempt); err != nil {
				t.Error(err)
			}
		})
		// Those in their long grace stay.
		r = w.replay(3)
		require.Equal(t, 2, r.Left.Waiting)
		w.replayed(late, 2)
		w.await("received", ids(waiting)...)
	})
}

// An event says processed, in every form in which it may come: nothing is sent
// again, though the grace is over.
func TestEventsInEveryForm(t *testing.T) {
	both(t, settings{"COMPLETION": "event"}, func(t *testing.T, w *world) {
		all := w.sends(7, http.StatusCreated)
		event := func(i int) string { return fmt.Sprintf(`{"id":%q,"outcome":"processed"}`, all[i].id) }
		completions := w.AckerURL() + "/v1/completions"
		for i, ask := range [][3]string{
			{"POST", completions, event(0)},
			{"POST", completions, "[" + event(1) + "]"},
			{"POST", completions, event(2) + "\n" + event(2) + "\n"},
			{"PUT", completions + "/" + all[3].id, ""},
			{"DELETE", w.AckerURL() + "/v1/requests/" + all[4].id, ""},
		} {
			status, text := w.ask(ask[0], ask[1], ask[2])
			require.Equal(t, http.StatusAccepted, status, "%d: %s", i, text)
		}
		w.cli("pub", "holdfast.completions.default.event", event(5))
		w.cli("pub", "holdfast.completions._.event", "["+event(6)+"]")
		w.await("processed", ids(all)...)
		require.Empty(t, w.replayable())
		w.nothingLeft()
		require.Equal(t, len(all), w.api.count())
	})
}

// NATS down or slow | the API's answer | in the spool, published when NATS is
// back.
func TestFailureOfNATS(t *testing.T) {
	for name, fault := range map[string]struct {
		begin, end func(t *testing.T, w *world)
	}{
		"down": {
			func(_ *testing.T, w *world) { w.Kill(harness.NATS) },
			func(t *testing.T, w *world) { require.NoError(t, w.Start(t.Context(), harness.NATS)) },
		},
		"slow": {
			func(t *testing.T, w *world) { require.NoError(t, w.Process(harness.NATS).Signal(syscall.SIGSTOP)) },
			func(t *testing.T, w *world) { require.NoError(t, w.Process(harness.NATS).Signal(syscall.SIGCONT)) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			distributed(t, nil, func(t *testing.T, w *world) {
				before := w.sends(3, http.StatusCreated)
				w.await("processed", ids(before)...)
				w.awaitSpool()

				fault.begin(t, w)
				good := w.sends(10, http.StatusCreated)
				w.api.now(broken)
				bad := w.sends(5, http.StatusInternalServerError)
				require.Equal(t, 30.0, w.metric(harness.Ingress, "holdfast_spool_unreleased"))
				for _, s := range append(good, bad...) {
					_, known := w.look(s.id)
					require.False(t, known, "the ledger cannot know %s", s.id)
				}
				// No replay goes out without the acker.
				r := w.replay(1, "--fence-timeout", "1s")
				require.Contains(t, r.Reason, "acker")
				require.Equal(t, 18, w.api.count())

				fault.end(t, w)
				w.await("processed", ids(good)...)
				w.await("failed", ids(bad)...)
				w.api.now(works)
				w.replay(0)
				w.replayed(good, 1)
				w.replayed(bad, 2)
				w.awaitSpool()
			})
		})
	}
}

// ingress killed | a broken connection | the spool is published at the next
// start; the outcome is in the spool before the answer's last byte, so kill -9
// after the answer makes no repeat.
func TestFailureOfTheIngress(t *testing.T) {
	both(t, settings{"UPSTREAM_TIMEOUT": "2s"}, func(t *testing.T, w *world) {
		// Nothing reaches the ledger: only the spool has what follows.
		unlock := w.lockLedger()

		// In the middle of an exchange: the API works on it and does not answer.
		letGo := make(chan struct{})
		w.api.now(hangs(letGo))
		broken := make(chan sent, 1)
		body := "in the middle\n"
		go func() { broken <- w.sendBody(body) }()
		w.api.await(1)
		middle := w.api.ids()[0]

		// After the answer. The spool keeps the order, so that what was captured
		// before is on disk too.
		w.api.now(works)
		after := w.sends(20, http.StatusCreated)
		w.Kill(harness.Ingress)
		s := <-broken
		require.Error(t, s.err)
		require.Zero(t, s.status)
		close(letGo)
		for _, s := range after {
			_, known := w.look(s.id)
			require.False(t, known, "the ledger knows %s before the kill: it proves nothing", s.id)
		}

		unlock()
		require.NoError(t, w.Start(t.Context()))
		w.await("processed", ids(after)...)
		w.awaitReplayable(middle)
		r := w.replay(0)
		require.Equal(t, 1, r.Sent)
		s.id = middle
		w.replayed([]sent{s}, 2)
		w.replayed(after, 1)
		w.nothingLeft()
	})
}

// recorder down | nothing | waits in spool and stream.
func TestFailureOfTheRecorder(t *testing.T) {
	distributed(t, nil, func(t *testing.T, w *world) {
		w.awaitHeard()
		w.Kill(harness.Recorder)
		good := w.sends(10, http.StatusCreated)
		w.api.now(broken)
		bad := w.sends(5, http.StatusInternalServerError)
		require.GreaterOrEqual(t, w.metric(harness.Ingress, "holdfast_spool_unreleased"), 15.0)
		// Nobody writes down what the ingress says of its spool.
		r := w.replay(1, "--fence-timeout", "1s")
		require.Contains(t, r.Reason, "ingress ingress-1")
		require.Equal(t, 15, w.api.count())

		require.NoError(t, w.Start(t.Context(), harness.Recorder))
		w.await("processed", ids(good)...)
		w.await("failed", ids(bad)...)
		w.api.now(works)
		w.replay(0)
		w.replayed(good, 1)
		w.replayed(bad, 2)
		w.awaitSpool()
	})
}

// acker down | nothing | no replay goes out without the acker.
func TestFailureOfTheAcker(t *testing.T) {
	distributed(t, nil, func(t *testing.T, w *world) {
		w.Kill(harness.Acker)
		good := w.sends(10, http.StatusCreated)
		w.api.now(broken)
		bad := w.sends(5, http.StatusInternalServerError)
		all := append(good, bad...)
		// They are known, and what became of them is not: their grace is over
		// once the timeout is.
		w.await("received", ids(all)...)
		w.awaitReplayable(ids(all)...)
		w.api.now(works)
		r := w.replay(1, "--fence-timeout", "1s")
		require.Contains(t, r.Reason, "the acker is 15 messages behind")
		require.Equal(t, 15, w.api.count())

		require.NoError(t, w.Start(t.Context(), harness.Acker))
		w.replay(0)
		w.replayed(good, 1)
		w.replayed(bad, 2)
		w.awaitSpool()
	})
}

// ledger down | nothing | waits in spool and stream.
func TestFailureOfTheLedger(t *testing.T) {
	both(t, nil, func(t *testing.T, w *world) {
		unlock := w.lockLedger()
		good := w.sends(10, http.StatusCreated)
		w.api.now(broken)
		bad := w.sends(5, http.StatusInternalServerError)
		require.Equal(t, 30.0, w.metric(harness.Ingress, "holdfast_spool_unreleased"))
		require.Empty(t, w.list(""))

		unlock()
		w.await("processed", ids(good)...)
		w.await("failed", ids(bad)...)
		w.api.now(works)
		w.replay(0)
		w.replayed(good, 1)
		w.replayed(bad, 2)
		w.awaitSpool()
	})
}

// A replayer that was killed has left a run with a selection of its own. One
// command finishes it, and sends what has failed since.
func TestFailureOfTheReplayer(t *testing.T) {
	both(t, settings{"UPSTREAM_TIMEOUT": "1s"}, func(t *testing.T, w *world) {
		w.api.now(broken)
		before := w.sends(10, http.StatusInternalServerError)
		w.await("failed", ids(before)...)
		letGo := make(chan struct{})
		w.api.now(hangs(letGo))
		killed, err := proc.Start(proc.Spec{
			Name: "replayer-to-be-killed", Path: filepath.Join(bin, "replayer"), Args: []string{"run", "--concurrency", "2"},
			Env: w.Env("replayer"), Dir: t.TempDir(),
		})
		require.NoError(t, err)
		w.api.await(len(before) + 1) // in the middle of an attempt
		killed.Kill()
		close(letGo)
		w.api.now(broken)
		after := w.sends(5, http.StatusInternalServerError)
		w.await("failed", ids(after)...)

		w.api.now(works)
		sent := w.api.count()
		r := w.replay(0, "--wait", "30s")
		require.Equal(t, "finished", r.End)
		require.Len(t, w.api.ids(), len(before)+len(after))
		require.Equal(t, len(before)+len(after), w.api.count()-sent, "each was sent once")
		for _, s := range append(before, after...) {
			w.await("processed", s.id)
		}
		w.nothingLeft()
	})
}

// smallSpool is a spool that some large requests fill.
var smallSpool = settings{"SPOOL_MAX_BYTES": "16MiB", "MAX_BODY_BYTES": "2MiB", "STREAM_MAX_BYTES": "128MiB"}

// nobodyRecords keeps everything in the spool until heal is called.
func (w *world) nobodyRecords() (heal func()) {
	if w.Topology() == harness.Standalone {
		return w.lockLedger()
	}
	w.Kill(harness.Recorder, harness.Acker)
	return func() { require.NoError(w.t, w.Start(w.t.Context(), harness.Recorder, harness.Acker)) }
}

// large is the body of the nth large request.
func large(n int) string { return fmt.Sprintf("large request %d\n", n) + strings.Repeat("x", 1<<20) }

// nothing can store | 503 and Retry-After, before the API sees a byte
// (`required`) | never silently dropped.
func TestFailureNothingCanStore(t *testing.T) {
	both(t, smallSpool, func(t *testing.T, w *world) {
		heal := w.nobodyRecords()
		var stored []sent
		var refused sent
		for n := range 40 {
			s := w.sendBody(large(n))
			if s.status != http.StatusCreated {
				refused = s
				break
			}
			w.answered(s, http.StatusCreated)
			stored = append(stored, s)
		}
		require.NoError(t, refused.err)
		require.Equal(t, http.StatusServiceUnavailable, refused.status)
		require.NotEmpty(t, refused.header.Get("Retry-After"))
		require.Equal(t, "no", refused.stored)
		require.NotEmpty(t, stored)
		require.Len(t, w.api.ids(), len(stored), "the API has seen a request that was refused")

		heal()
		// Without a restart.
		var again sent
		require.Eventually(t, func() bool {
			again = w.sendBody(large(100))
			return again.status == http.StatusCreated
		}, patience, 50*time.Millisecond, "there is room again")
		w.replayed(append(stored, again), 1)
		w.awaitSpool()
		w.nothingLeft()
	})
}

// nothing can store | the API's answer with `X-Request-Stored: no`
// (`best_effort`) | never silently dropped.
func TestFailureNothingCanStoreBestEffort(t *testing.T) {
	s := settings{"CAPTURE": "best_effort"}
	for name, value := range smallSpool {
		s[name] = value
	}
	both(t, s, func(t *testing.T, w *world) {
		heal := w.nobodyRecords()
		var stored []sent
		var passed sent
		for n := range 40 {
			s := w.sendBody(large(n))
			require.NoError(t, s.err)
			require.Equal(t, http.StatusCreated, s.status)
			if s.stored == "no" {
				passed = s
				break
			}
			stored = append(stored, s)
		}
		require.NotEmpty(t, passed.id, "the spool was never full")
		require.Len(t, w.api.of(passed.id), 1)

		heal()
		var again sent
		require.Eventually(t, func() bool {
			again = w.sendBody(large(100))
			return again.stored == "synced"
		}, patience, 50*time.Millisecond, "there is room again")
		w.replayed(append(stored, again), 1)
		_, known := w.look(passed.id)
		require.False(t, known)
	})
}

// A full disk: new requests are refused, old ones kept, and it recovers when
// there is room, without a restart.
func TestFailureDiskFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=160m"); err != nil {
		t.Fatalf("A DISK CANNOT BE FILLED HERE, because a tmpfs cannot be mounted: %v. Run this test as root, in a mount namespace of its own (unshare -m) where that is not wanted.", err)
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	w := prepare(t, harness.Standalone, dir, settings{"SPOOL_MAX_BYTES": "48MiB", "STREAM_MAX_BYTES": "32MiB", "MAX_BODY_BYTES": "2MiB"})
	require.NoError(t, w.Start(t.Context()))
	all := w.sends(10, http.StatusCreated)
	w.api.now(broken)
	bad := w.sends(5, http.StatusInternalServerError)
	w.await("processed", ids(all)...)
	w.await("failed", ids(bad)...)
	w.api.now(works)

	ballast := filepath.Join(dir, "ballast")
	fill(t, ballast)
	var refused sent
	for n := range 200 {
		s := w.sendBody(large(n))
		if s.status != http.StatusCreated {
			refused = s
			break
		}
		all = append(all, s)
	}
	require.NoError(t, refused.err)
	require.Equal(t, http.StatusServiceUnavailable, refused.status)
	require.NotEmpty(t, refused.header.Get("Retry-After"))
	require.Len(t, w.api.ids(), len(all)+len(bad), "the API has seen a request that was refused")
	w.await("failed", ids(bad)...)

	require.NoError(t, os.Remove(ballast))
	var again sent
	require.Eventually(t, func() bool {
		again = w.sendBody(large(1000))
		return again.status == http.StatusCreated
	}, patience, 50*time.Millisecond, "there is room again")
	w.replayed(append(all, again), 1)
	w.replay(0)
	w.replayed(bad, 2)
	w.awaitSpool()
}

// fill writes a file until the disk is full.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	block := bytes.Repeat([]byte{1}, 64<<10)
	for err == nil {
		_, err = f.Write(block)
	}
	require.ErrorIs(t, err, syscall.ENOSPC)
}
