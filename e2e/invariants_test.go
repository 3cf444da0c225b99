package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
	"github.com/holdfast-io/holdfast/pkg/spool"
)

// The tests of this file are the design's invariants, by number.

// prefix is an earlier state of the streams, to which they are cut back.
type prefix struct {
	name string
	// when says how much of the second load is in it: nothing or a part; or
	// that there were no streams at all.
	when string
	// consumers says that the state of the consumers is kept, which is then
	// ahead of the streams.
	consumers bool
}

// Invariant 1: across every spool release and stream trim, each answered id is
// in spool ∪ untrimmed stream ∪ ledger, also after cutting the stream back to
// any earlier prefix.
func TestInvariant1NothingIsLostWithTheStream(t *testing.T) {
	t.Parallel()
	for _, p := range []prefix{
		{"whole to before the load", "before", false},
		{"messages to the middle of the load", "middle", true},
		{"messages to before the load", "before", true},
		{"to nothing", "never", false},
	} {
		t.Run(p.name, func(t *testing.T) {
			both(t, nil, func(t *testing.T, w *world) { w.cutBack(p) })
		})
	}
}

func (w *world) cutBack(p prefix) {
	t := w.t
	earlier := filepath.Join(t.TempDir(), "earlier")
	keep := func() {
		w.Kill(harness.NATS)
		require.NoError(t, os.CopyFS(earlier, os.DirFS(w.NATSDir())))
	}
	js := w.jetStream()

	first := w.sends(10, http.StatusCreated)
	w.await("processed", ids(first)...)
	w.awaitSpool()
	if p.when == "before" {
		keep()
		require.NoError(t, w.Start(t.Context()))
	}
	// What follows reaches the stream, and not the ledger.
	unlock := w.lockLedger()
	good := w.sends(6, http.StatusCreated)
	w.awaitStream(js, 16)
	if p.when == "middle" {
		keep()
		if w.Topology() == harness.Standalone {
			unlock() // it does not start on a locked ledger
		}
		require.NoError(t, w.Start(t.Context()))
		w.awaitStream(js, 16)
		if w.Topology() == harness.Standalone {
			unlock = w.lockLedger()
		}
	}
	good = append(good, w.sends(6, http.StatusCreated)...)
	w.api.now(broken)
	bad := w.sends(5, http.StatusInternalServerError)
	all := slices.Concat(first, good, bad)
	w.awaitStream(js, 27)

	// Power goes, and the stream comes back as it was earlier.
	w.Kill(harness.NATS)
	if w.Topology() == harness.Standalone {
		unlock()
	}
	w.restore(p, earlier)
	known := w.everywhere()
	for _, s := range all {
		require.True(t, known[s.id], "%s is nowhere", s.id)
	}
	w.api.now(works)
	require.NoError(t, w.Start(t.Context()))
	unlock()

	w.await("processed", ids(append(first, good...))...)
	w.await("failed", ids(bad)...)
	w.replay(0)
	w.replayed(append(first, good...), 1)
	w.replayed(bad, 2)
	w.awaitSpool()
	w.nothingLeft()
}

// awaitStream waits until the requests stream has had so many messages.
func (w *world) awaitStream(js jetstream.JetStream, n uint64) {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		s, err := js.Stream(w.t.Context(), capture.RequestsStream)
		return err == nil && s.CachedInfo().State.LastSeq >= n
	}, patience, 10*time.Millisecond, "the stream has %d messages", n)
}

// restore cuts the streams' directory back.
func (w *world) restore(p prefix, earlier string) {
	t := w.t
	if p.when == "never" {
		require.NoError(t, os.RemoveAll(filepath.Join(w.NATSDir(), "jetstream")))
		return
	}
	for _, name := range []string{capture.RequestsStream, capture.CompletionsStream} {
		path := filepath.Join("jetstream", "$G", "streams", name)
		if p.consumers {
			path = filepath.Join(path, "msgs")
		}
		require.DirExists(t, filepath.Join(earlier, path))
		require.NoError(t, os.RemoveAll(filepath.Join(w.NATSDir(), path)))
		require.NoError(t, os.CopyFS(filepath.Join(w.NATSDir(), path), os.DirFS(filepath.Join(earlier, path))))
	}
}

// everywhere gives the ids of all requests in spool, stream and ledger, read
// from copies of their files. Of the spool it counts what a restart finds
// there, which is more than what is unreleased; so where the ingress still runs,
// its own count of unreleased records must cover what no one else has.
func (w *world) everywhere() map[string]bool {
	t := w.t
	ctx := t.Context()
	dir := t.TempDir()
	known := map[string]bool{}

	ledgerDir := filepath.Join(dir, "ledger")
	require.NoError(t, os.Mkdir(ledgerDir, 0o700))
	for _, suffix := range []string{"", "-wal"} {
		b, err := os.ReadFile(w.Ledger() + suffix)
		if suffix != "" && os.IsNotExist(err) {
			continue
		}
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(ledgerDir, "ledger.db"+suffix), b, 0o600))
	}
	store, err := sqlite.Open(ctx, sqlite.Options{Path: filepath.Join(ledgerDir, "ledger.db")})
	require.NoError(t, err)
	defer store.Close()
	for cursor := ""; ; {
		page, err := store.List(ctx, ledger.Filter{}, cursor, 1000)
		require.NoError(t, err)
		for _, r := range page.Requests {
			known[r.ID.String()] = true
		}
		if cursor = page.Next; cursor == "" {
			break
		}
	}
	w.readStream(filepath.Join(dir, "nats"), known)

	if p := w.Process(harness.Ingress); p.Running() {
		// It has seen the connection go; what it counts does not change any more
		// while the ledger is locked.
		unreleased := w.metric(harness.Ingress, "holdfast_spool_unreleased")
		require.Equal(t, 34.0, unreleased, "17 captures and their outcomes")
	}
	require.NoError(t, os.CopyFS(filepath.Join(dir, "spool"), os.DirFS(w.SpoolDir())))
	sp, err := spool.Open(spool.Options{Dir: filepath.Join(dir, "spool"), MaxBytes: 512 << 20})
	require.NoError(t, err)
	defer sp.Close()
	for reader := sp.UnreleasedBefore(time.Now()); ; {
		record, err := reader.Next(ctx)
		if err != nil {
			require.ErrorContains(t, err, "EOF")
			break
		}
		m, err := capture.ParseRecord(record.Data)
		require.NoError(t, err)
		if m.ID != "" {
			known[m.ID] = true
		}
	}
	return known
}

// readStream adds the ids of the requests stream, from a copy of its directory.
func (w *world) readStream(dir string, known map[string]bool) {
	t := w.t
	require.NoError(t, os.CopyFS(dir, os.DirFS(w.NATSDir())))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "VERSION"), []byte("1\n"), 0o600)) // nats-server itself has none
	server, err := embednats.Start(embednats.Options{StoreDir: dir, Addr: "127.0.0.1:0", MaxStoreBytes: 4 << 30, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer func() { require.NoError(t, server.Stop(context.Background())) }()
	nc, err := nats.Connect("", server.InProcess())
	require.NoError(t, err)
	defer nc.Close()
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	s, err := js.Stream(t.Context(), capture.RequestsStream)
	if err != nil {
		require.ErrorIs(t, err, jetstream.ErrStreamNotFound)
		return
	}
	state := s.CachedInfo().State
	for seq := state.FirstSeq; seq <= state.LastSeq && seq > 0; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		require.NoError(t, err)
		known[m.Header.Get(capture.HeaderID)] = true
	}
}

// Invariant 2: at every send, no completion of that id was durable when its
// attempt row was written: neither in the ledger, nor in the stream before the
// page began.
func TestInvariant2NothingCompletedIsSent(t *testing.T) {
	both(t, settings{"COMPLETION": "event"}, func(t *testing.T, w *world) {
		w.api.now(broken)
		all := w.sends(60, http.StatusInternalServerError)
		w.await("failed", ids(all)...)
		js := w.jetStream()

		// The first twenty are in the stream; the acker gets to know them only
		// while the replay is waiting for it.
		var unlock func()
		if w.Topology() == harness.Distributed {
			w.Kill(harness.Acker)
		} else {
			unlock = w.lockLedger()
		}
		for _, s := range all[:20] {
			w.publish(js, capture.EventSubject("default"), fmt.Appendf(nil, `{"id":%q,"outcome":"processed"}`, s.id))
		}

		// While a request is sent, one that comes later is completed over HTTP:
		// the answer says that this is durable. One at a time is in flight, so
		// that no attempt of it can have begun.
		var mu sync.Mutex
		completed := map[string]bool{}
		rest := ids(all[20:])
		w.api.now(func(rw http.ResponseWriter, _ *http.Request, a arrival) {
			mu.Lock()
			defer mu.Unlock()
			if completed[a.ID] {
				t.Errorf("%s was sent after its completion was durable", a.ID)
			}
			if i := slices.Index(rest, a.ID); i >= 0 && i+1 < len(rest) {
				last := rest[len(rest)-1]
				rest = rest[:len(rest)-1]
				if err := w.complete(last, 1); err != nil {
					t.Error(err)
					return
				}
				completed[last] = true
			}
			rw.WriteHeader(http.StatusInternalServerError)
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _, err := w.Replay(context.Background(), "run", "--concurrency", "1", "--max-attempts", "1", "--fence-timeout", "60s")
			if err != nil {
				t.Error(err)
			}
		}()
		if unlock != nil {
			unlock()
		} else {
			require.NoError(t, w.Start(t.Context(), harness.Acker))
		}
		<-done

		for _, s := range all[:20] {
			require.Len(t, w.api.of(s.id), 1, "%s was sent, though its completion was in the stream", s.id)
			w.await("processed", s.id)
		}
		require.GreaterOrEqual(t, len(completed), 15)
		for id := range completed {
			require.Len(t, w.api.of(id), 1)
		}
		require.Greater(t, w.api.count(), 60, "nothing was replayed: this proves nothing")
	})
}

// Invariant 3: each request has at most one unresolved attempt over all runs,
// and its attempts rise, though several replayers run at once and one is killed.
// (Ordering keys come later: until then each request is a key of its own.)
func TestInvariant3OneAttemptAtATime(t *testing.T) {
	both(t, settings{"UPSTREAM_TIMEOUT": "2s"}, func(t *testing.T, w *world) {
		w.api.now(broken)
		all := w.sends(150, http.StatusInternalServerError)
		w.await("failed", ids(all)...)

		// Some fail once more, so that attempts meet.
		var mu sync.Mutex
		failed := map[string]bool{}
		w.api.now(func(rw http.ResponseWriter, r *http.Request, a arrival) {
			mu.Lock()
			again := !failed[a.ID] && a.ID[len(a.ID)-1]%3 == 0
			failed[a.ID] = true
			mu.Unlock()
			if again {
				broken(rw, r, a)
				return
			}
			works(rw, r, a)
		})
		killed, err := proc.Start(proc.Spec{
			Name: "replayer-to-be-killed", Path: filepath.Join(bin, "replayer"), Args: []string{"run", "--concurrency", "8"},
			Env: w.Env("replayer"), Dir: t.TempDir(),
		})
		require.NoError(t, err)
		t.Cleanup(killed.Kill)
		var wg sync.WaitGroup
		for _, args := range [][]string{{"run"}, {"run", "--state", "failed"}, {"run", "--path", "/calls"}} {
			wg.Go(func() {
				if _, _, err := w.Replay(context.Background(), args...); err != nil {
					t.Error(err)
				}
			})
		}
		w.api.await(len(all) + 20)
		killed.Kill()
		wg.Wait()
		w.replay(0, "--wait", "30s") // for the leases of the killed one
		require.Empty(t, w.replayable())

		require.Empty(t, w.api.overlapping(), "two attempts of one request at once")
		for _, s := range all {
			w.await("processed", s.id)
			got := w.api.of(s.id)
			for i := 1; i < len(got); i++ {
				require.Greater(t, got[i].Attempt, got[i-1].Attempt, s.id)
			}
			// What the killed replayer had in flight, or had an answer for and not
			// written, comes once more: these attempts have no end.
			attempts := 2
			if s.id[len(s.id)-1]%3 == 0 {
				attempts = 3
			}
			r, ok := w.look(s.id)
			require.True(t, ok)
			require.GreaterOrEqual(t, len(got), attempts)
			for _, a := range r.Attempts {
				if a.Verdict == "" {
					attempts++
				}
			}
			require.LessOrEqual(t, len(got), attempts, "%s was sent again: %+v", s.id, r)
		}
	})
}

// Invariant 4: once faults are healed, fence, ack floors, spool and trims all
// advance in bounded time despite any single bad message, chunk or row.
func TestInvariant4EverythingAdvances(t *testing.T) {
	both(t, settings{"STREAM_MAX_BYTES": "4MiB"}, func(t *testing.T, w *world) {
		js := w.jetStream()
		w.api.now(broken)
		bad := w.sends(2, http.StatusInternalServerError)
		w.await("failed", ids(bad)...)
		w.poison(js)
		row := uuid.MustParse(bad[0].id)
		w.alter("UPDATE payloads SET body = x'00' WHERE seq = (SELECT seq FROM requests WHERE id = ?)", row[:])
		w.api.now(works)

		// All faults at once, under load.
		heal := w.nobodyRecords()
		var all []sent
		for n := range 30 {
			s := w.sendBody(fmt.Sprintf("%d %s", n, strings.Repeat("x", 150<<10)))
			w.answered(s, http.StatusCreated)
			all = append(all, s)
		}
		if w.Topology() == harness.Distributed {
			w.Kill(harness.NATS)
			require.NoError(t, w.Start(t.Context(), harness.NATS))
		}
		heal()

		w.await("processed", ids(all)...)
		w.awaitSpool()
		w.awaitPassed(js)
		r := w.replay(3, "--max-attempts", "1", "--fence-timeout", "20s") // the fence passes
		require.Equal(t, 1, r.Processed)
		require.Equal(t, 1, r.Left.Replayable)
		require.Eventually(t, func() bool {
			s, err := js.Stream(t.Context(), capture.RequestsStream)
			return err == nil && s.CachedInfo().State.FirstSeq > 12 && s.CachedInfo().State.Bytes <= 2<<20
		}, patience, 50*time.Millisecond, "the stream is trimmed past the bad messages")
		// And goes on.
		w.replayed(w.sends(3, http.StatusCreated), 1)
	})
}

// Invariant 5: conservation, by id: answered = received + failed + rejected +
// quarantined + discarded + processed + in flight + set aside + expired.
func TestInvariant5Conservation(t *testing.T) {
	both(t, settings{"COMPLETION": "event", "GRACE": "1h"}, func(t *testing.T, w *world) {
		js := w.jetStream()
		want := map[string]string{}
		put := func(state string, all []sent) {
			for _, s := range all {
				want[s.id] = state
			}
		}
		put("received", w.sends(3, http.StatusCreated))
		processed := w.sends(3, http.StatusCreated)
		for _, s := range processed {
			status, text := w.ask("PUT", w.AckerURL()+"/v1/completions/"+s.id, "")
			require.Equal(t, http.StatusAccepted, status, text)
		}
		put("processed", processed)
		w.api.now(broken)
		put("failed", w.sends(3, http.StatusInternalServerError))
		discarded := w.sends(2, http.StatusInternalServerError)
		put("discarded", discarded)
		w.api.now(refuses)
		put("rejected", w.sends(3, http.StatusUnprocessableEntity))
		w.api.now(works)
		// One that the gateway was given long ago, and that comes only now.
		late := capture.Request{
			ID: uuid.Must(uuid.NewV7()), Route: "default", Ingress: "ingress-1", ReceivedAt: time.Now().Add(-60 * 24 * time.Hour),
			Policy: capture.DefaultPolicy(), Head: []byte("POST /late HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"),
		}
		w.publishRequest(js, &late)
		want[late.ID.String()] = "quarantined"
		w.await("failed", ids(discarded)...)
		code, out, err := w.Replay(t.Context(), "discard", "--id", strings.Join(ids(discarded), ","), "--reason", "a test")
		require.NoError(t, err)
		require.Zero(t, code, out)

		// These stay in flight.
		for id, state := range want {
			w.await(state, id)
		}
		heal := w.nobodyRecords()
		flying := w.sends(4, http.StatusCreated)
		states := func() map[string]string {
			found := map[string]string{}
			db, err := sqlite.Open(t.Context(), sqlite.Options{Path: w.Ledger()})
			require.NoError(t, err)
			defer db.Close()
			page, err := db.List(t.Context(), ledger.Filter{}, "", 1000)
			require.NoError(t, err)
			for _, r := range page.Requests {
				found[r.ID.String()] = string(r.State)
			}
			return found
		}
		require.Equal(t, want, states())
		require.Equal(t, 8.0, w.metric(harness.Ingress, "holdfast_spool_unreleased"), "four captures and their outcomes")
		heal()
		put("received", flying)
		w.await("received", ids(flying)...)
		w.awaitSpool()
		require.Equal(t, want, states())

		// The read API's own counts say the same.
		counts := map[string]int{}
		for _, state := range want {
			counts[state]++
		}
		var stats struct {
			Requests map[string]int
			Aside    map[string]int
			Expired  int
		}
		require.NoError(t, harness.GetJSON(t.Context(), w.RecorderURL()+"/v1/stats", &stats))
		require.Equal(t, counts, stats.Requests)
		require.Zero(t, stats.Expired)
		text, err := json.Marshal(stats.Aside)
		require.NoError(t, err)
		for kind, n := range stats.Aside {
			require.Zero(t, n, "%s: %s", kind, text)
		}
	})
}
