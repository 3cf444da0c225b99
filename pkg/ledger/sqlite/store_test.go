package sqlite_test

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
)

// childEnv makes the test binary a writer of the ledger that it names, which it
// fills batch by batch, and says so after each commit.
const childEnv = "LEDGER_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := child(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func child(path string) error {
	ctx := context.Background()
	s, err := sqlite.Open(ctx, sqlite.Options{Path: path, BusyTimeout: 30 * time.Second})
	if err != nil {
		return err
	}
	batches, err := strconv.Atoi(os.Getenv(childEnv + "_BATCHES"))
	if err != nil {
		return err
	}
	for range batches {
		var items []ledger.Item
		var facts []ledger.Fact
		var line strings.Builder
		for range 1 + rand.IntN(50) {
			id := newID()
			items = append(items, request(id, rand.IntN(4096)))
			facts = append(facts, outcome(id, capture.Processed, 200))
			line.WriteString(" " + id.String())
		}
		if _, err := s.Record(ctx, items); err != nil {
			return err
		}
		fmt.Println("recorded" + line.String())
		if _, err := s.Complete(ctx, facts); err != nil {
			return err
		}
		fmt.Println("completed" + line.String())
	}
	return s.Close()
}

func startChild(t *testing.T, path string, batches int) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+path, childEnv+"_BATCHES="+strconv.Itoa(batches))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	return cmd, lines
}

// said adds what a child says of its requests to what is known of them.
func said(t *testing.T, line string, known map[uuid.UUID]capture.State) {
	t.Helper()
	words := strings.Fields(line)
	for _, w := range words[1:] {
		id, err := uuid.Parse(w)
		require.NoError(t, err)
		if known[id] = capture.StateReceived; words[0] == "completed" {
			known[id] = capture.StateProcessed
		}
	}
}

func newID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

func request(id uuid.UUID, size int) ledger.Item {
	return ledger.Item{
		Captured: capture.Captured{Request: &capture.Request{
			ID: id, Route: "default", Ingress: "a", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
			Head: []byte("POST /v1/calls/12345?x=y HTTP/1.1\r\nHost: api.example.com\r\nUser-Agent: bench/1.0\r\nContent-Type: application/json\r\n\r\n"),
			Body: make([]byte, size), Size: int64(size),
		}},
		Ref: capture.SpoolRef{Ingress: "a", Start: "00ff", Index: 7},
	}
}

func outcome(id uuid.UUID, verdict capture.Verdict, status int) ledger.Fact {
	now := time.Now()
	return ledger.Fact{Outcome: &capture.Outcome{ID: id, Ingress: "a", Attempt: capture.Attempt{
		Number: capture.FirstAttempt, StartedAt: now, EndedAt: now, Status: status, Verdict: verdict,
	}}}
}

func open(t testing.TB, o sqlite.Options) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(context.Background(), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// raw opens the file beside the store.
func raw(t *testing.T, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

func sound(t *testing.T, path string) {
	t.Helper()
	var word string
	require.NoError(t, raw(t, path).QueryRow("PRAGMA integrity_check").Scan(&word))
	require.Equal(t, "ok", word)
}

func checkStates(t *testing.T, s *sqlite.Store, known map[uuid.UUID]capture.State) {
	t.Helper()
	for id, want := range known {
		d, err := s.Get(context.Background(), id)
		require.NoError(t, err)
		if d.State != capture.StateProcessed { // the last word of a killed child may have been lost
			require.Equal(t, want, d.State)
		}
		head, body, err := s.Payload(context.Background(), id)
		require.NoError(t, err)
		require.NotEmpty(t, head)
		require.NoError(t, body.Close())
	}
}

func TestTwoProcessesOnOneFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	// Neither finds a ledger: both make one, and one of them wins.
	one, oneSays := startChild(t, path, 30)
	two, twoSays := startChild(t, path, 30)
	known := make(map[uuid.UUID]capture.State)
	s := open(t, sqlite.Options{Path: path})
	for oneSays.Scan() {
		said(t, oneSays.Text(), known)
		checkStates(t, s, map[uuid.UUID]capture.State{}) // reads go on beside
	}
	for twoSays.Scan() {
		said(t, twoSays.Text(), known)
	}
	require.NoError(t, one.Wait())
	require.NoError(t, two.Wait())
	checkStates(t, s, known)
	st, err := s.Stats(context.Background())
	require.NoError(t, err)
	require.EqualValues(t, len(known), st.Requests[capture.StateProcessed])
	seqs := make(map[int64]bool)
	for cursor := ""; ; {
		page, err := s.List(context.Background(), ledger.Filter{}, cursor, 1000)
		require.NoError(t, err)
		for _, r := range page.Requests {
			require.False(t, seqs[r.Seq], "two requests at one place of the insertion sequence")
			seqs[r.Seq] = true
		}
		if cursor = page.Next; cursor == "" {
			break
		}
	}
	require.Len(t, seqs, len(known))
	sound(t, path)
}

func TestKilledWriter(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(t.TempDir(), "ledger.db")
	known := make(map[uuid.UUID]capture.State)
	for range 8 {
		fresh := make(map[uuid.UUID]capture.State)
		cmd, says := startChild(t, path, 1<<30)
		for range 1 + rng.IntN(30) {
			require.True(t, says.Scan())
			said(t, says.Text(), fresh)
		}
		require.NoError(t, cmd.Process.Kill())
		for says.Scan() {
			line := says.Text()
			if words := strings.Fields(line); len(words[len(words)-1]) != 36 {
				line = strings.Join(words[:len(words)-1], " ") // cut short by the kill
			}
			said(t, line, fresh)
		}
		require.Error(t, cmd.Wait())
		s, err := sqlite.Open(context.Background(), sqlite.Options{Path: path})
		require.NoError(t, err)
		checkStates(t, s, fresh)
		maps.Copy(known, fresh)
		st, err := s.Stats(context.Background())
		require.NoError(t, err)
		page, err := s.List(context.Background(), ledger.Filter{States: []capture.State{capture.StateReceived}}, "", 1000)
		require.NoError(t, err)
		require.EqualValues(t, len(page.Requests), st.Requests[capture.StateReceived])
		require.NoError(t, s.Close())
	}
	checkStates(t, open(t, sqlite.Options{Path: path}), known)
	sound(t, path)
}

func TestLockHeldByAnother(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "ledger.db")
	s := open(t, sqlite.Options{Path: path, BusyTimeout: 50 * time.Millisecond})
	id := newID()
	_, err := s.Record(ctx, []ledger.Item{request(id, 10)})
	require.NoError(t, err)
	other, err := raw(t, path).Conn(ctx)
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Close()) }()
	_, err = other.ExecContext(ctx, "BEGIN IMMEDIATE")
	require.NoError(t, err)
	_, err = s.Record(ctx, []ledger.Item{request(newID(), 10)})
	require.ErrorIs(t, err, ledger.ErrUnavailable)
	_, err = s.Complete(ctx, []ledger.Fact{outcome(id, capture.Failed, 500)})
	require.ErrorIs(t, err, ledger.ErrUnavailable)
	require.ErrorIs(t, s.Ping(ctx), ledger.ErrUnavailable)
	_, err = s.Get(ctx, id)
	require.NoError(t, err, "reading goes on")
	// Another store opens beside it, and its wait ends with its caller's.
	patient := open(t, sqlite.Options{Path: path, BusyTimeout: time.Hour})
	waiting, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, patient.Ping(waiting), context.DeadlineExceeded)
	_, err = other.ExecContext(ctx, "ROLLBACK")
	require.NoError(t, err)
	require.NoError(t, s.Ping(ctx))
	require.NoError(t, patient.Ping(ctx))
	_, err = s.Complete(ctx, []ledger.Fact{outcome(id, capture.Failed, 500)})
	require.NoError(t, err)
}

func TestFilesArePrivate(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	dir := t.TempDir()
	s := open(t, sqlite.Options{Path: filepath.Join(dir, "ledger.db")})
	_, err := s.Record(context.Background(), []ledger.Item{request(newID(), 10)})
	require.NoError(t, err)
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	names := make([]string, 0, len(files))
	for _, f := range files {
		info, err := f.Info()
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode(), f.Name())
		names = append(names, f.Name())
	}
	require.Equal(t, []string{"ledger.db", "ledger.db-shm", "ledger.db-wal"}, names, "nothing else is left behind")
}

func TestOddPaths(t *testing.T) {
	for _, name := range []string{"a b.db", "what?.db", "50%41.db", "#1.db", "ü;x=y&z.db"} {
		path := filepath.Join(t.TempDir(), name)
		s := open(t, sqlite.Options{Path: path})
		require.NoError(t, s.Ping(context.Background()))
		require.FileExists(t, path)
	}
	_, err := sqlite.Open(context.Background(), sqlite.Options{})
	require.Error(t, err)
	_, err = sqlite.Open(context.Background(), sqlite.Options{Path: filepath.Join(t.TempDir(), "none", "ledger.db")})
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestRefusedAndLeftAsItIs(t *testing.T) {
	ctx := context.Background()
	// A ledger with something in it, closed: all of it is in the one file.
	good := filepath.Join(t.TempDir(), "ledger.db")
	s, err := sqlite.Open(ctx, sqlite.Options{Path: good})
	require.NoError(t, err)
	for range 20 {
		_, err = s.Record(ctx, []ledger.Item{request(newID(), 10_000)})
		require.NoError(t, err)
	}
	require.NoError(t, s.Close())
	whole, err := os.ReadFile(good)
	require.NoError(t, err)
	foreign := filepath.Join(t.TempDir(), "foreign.db")
	_, err = raw(t, foreign).Exec("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
	require.NoError(t, err)
	other, err := os.ReadFile(foreign)
	require.NoError(t, err)
	change := func(at int, b ...byte) []byte {
		c := bytes.Clone(whole)
		copy(c[at:], b)
		return c
	}
	garbage := make([]byte, 20_000)
	for i := range garbage {
		garbage[i] = byte(rand.Uint32())
	}
	for name, c := range map[string]struct {
		data []byte
		want error
	}{
		"newer schema":      {change(60, 0, 0, 0, 99), ledger.ErrNewerSchema},
		"empty":             {nil, ledger.ErrDamaged},
		"shorter":           {whole[:50], ledger.ErrDamaged},
		"garbage":           {garbage, ledger.ErrDamaged},
		"cut off":           {whole[:len(whole)/2], ledger.ErrDamaged},
		"cut by a byte":     {whole[:len(whole)-1], ledger.ErrDamaged},
		"another program's": {other, ledger.ErrDamaged},
		"broken inside":     {change(100, garbage[:8000]...), ledger.ErrDamaged},
		"without tables":    {change(100, append([]byte{13, 0, 0, 0, 0, 0x20, 0, 0}, make([]byte, 8092-100)...)...), ledger.ErrDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ledger.db")
			require.NoError(t, os.WriteFile(path, c.data, 0o600))
			_, err := sqlite.Open(ctx, sqlite.Options{Path: path})
			require.ErrorIs(t, err, c.want)
			require.ErrorContains(t, err, path)
			after, err := os.ReadFile(path)
			require.NoError(t, err)
			require.True(t, bytes.Equal(c.data, after), "the file was altered")
		})
	}
	open(t, sqlite.Options{Path: good})
}

func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=48m"); err != nil {
		if os.Getenv("LEDGER_TEST_NAMESPACE") != "" {
			t.Fatalf("no tmpfs in a namespace of our own: %v", err)
		}
		t.Logf("not allowed to mount here (%v): trying in a user namespace", err)
		exe, err := os.Executable()
		require.NoError(t, err)
		cmd := exec.Command(exe, "-test.run=^TestDiskFull$", "-test.v")
		cmd.Env = append(os.Environ(), "LEDGER_TEST_NAMESPACE=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) {
			t.Skipf("NOT TESTED: a full disk needs a small file system, and neither a mount nor a user namespace is allowed: %v", err)
		}
		require.NoError(t, err, "%s", out)
		return
	}
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, 0)) })
	ctx := context.Background()
	path := filepath.Join(dir, "ledger.db")
	s, err := sqlite.Open(ctx, sqlite.Options{Path: path})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }() // before the file system goes
	var ids []uuid.UUID
	for err == nil {
		var items []ledger.Item
		for range 64 {
			items = append(items, request(newID(), 16<<10))
		}
		if _, err = s.Record(ctx, items); err == nil {
			for _, i := range items {
				ids = append(ids, i.Captured.ID())
			}
		}
		require.Less(t, len(ids), 48<<20/(16<<10), "it never got full")
	}
	require.ErrorIs(t, err, ledger.ErrFull)
	require.Greater(t, len(ids), 1000, "there was room for more")
	// Everything else goes on, from the reserve.
	for part := range chunksOf(ids, 500) {
		var facts []ledger.Fact
		for _, id := range part {
			facts = append(facts, outcome(id, capture.Failed, 500), outcome(id, capture.Processed, 200))
		}
		_, err = s.Complete(ctx, facts)
		require.NoError(t, err)
	}
	require.NoError(t, s.SetAside(ctx, []ledger.Aside{{Kind: "capture", Reason: "x", Data: make([]byte, 64<<10)}}))
	require.NoError(t, s.Ping(ctx))
	_, err = s.Record(ctx, []ledger.Item{request(newID(), 16<<10)})
	require.ErrorIs(t, err, ledger.ErrFull)
	// A disk that is full to the last byte, by somebody else's file.
	hog, err := os.Create(filepath.Join(dir, "hog"))
	require.NoError(t, err)
	for err == nil {
		_, err = hog.Write(make([]byte, 4096))
	}
	require.ErrorIs(t, err, syscall.ENOSPC)
	_, err = s.Get(ctx, ids[0])
	require.NoError(t, err)
	full := 0
	for range 5000 { // what the WAL already has may take a while to use up
		if _, err = s.Complete(ctx, []ledger.Fact{{Event: &capture.Event{ID: newID(), Outcome: capture.Failed, Attempt: 1, Detail: strings.Repeat("x", 8000)}}}); err != nil {
			require.ErrorIs(t, err, ledger.ErrFull)
			if full++; full == 3 {
				break
			}
		}
	}
	require.Equal(t, 3, full, "the disk was not full at all")
	require.NoError(t, hog.Close())
	require.NoError(t, os.Remove(hog.Name()))
	// Room is made by the ledger itself.
	for more := true; more; {
		_, more, err = s.Expire(ctx, ledger.Retention{KeepProcessed: time.Nanosecond, Retention: time.Hour}, 200)
		require.NoError(t, err)
	}
	_, err = s.Record(ctx, []ledger.Item{request(newID(), 16<<10)})
	require.NoError(t, err)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Less(t, info.Size(), int64(16<<20), "the file follows what it holds")
	d, err := s.Get(ctx, ids[len(ids)-1])
	require.NoError(t, err)
	require.Equal(t, capture.StateProcessed, d.State)
	sound(t, path)
}

func chunksOf[T any](s []T, n int) func(func([]T) bool) {
	return func(yield func([]T) bool) {
		for len(s) > 0 {
			k := min(n, len(s))
			if !yield(s[:k]) {
				return
			}
			s = s[k:]
		}
	}
}

func cpuTime(tb testing.TB) time.Duration {
	var r syscall.Rusage
	require.NoError(tb, syscall.Getrusage(syscall.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkBatches commits 500 captures of a kilobyte, then their outcomes.
func BenchmarkBatches(b *testing.B) {
	ctx := context.Background()
	s := open(b, sqlite.Options{Path: filepath.Join(b.TempDir(), "ledger.db")})
	const n = 500
	var wall, cpu [2]time.Duration
	measure := func(i int, f func()) {
		t, c := time.Now(), cpuTime(b)
		f()
		wall[i] += time.Since(t)
		cpu[i] += cpuTime(b) - c
	}
	for b.Loop() {
		items, facts := make([]ledger.Item, n), make([]ledger.Fact, n)
		for i := range items {
			id := newID()
			items[i], facts[i] = request(id, 1024), outcome(id, capture.Processed, 200)
		}
		measure(0, func() {
			_, err := s.Record(ctx, items)
			require.NoError(b, err)
		})
		measure(1, func() {
			_, err := s.Complete(ctx, facts)
			require.NoError(b, err)
		})
	}
	for i, name := range []string{"record", "complete"} {
		b.ReportMetric(float64(wall[i].Nanoseconds())/float64(b.N*n), "ns/"+name)
		b.ReportMetric(float64(cpu[i].Nanoseconds())/float64(b.N*n), "cpu-ns/"+name)
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkListReplayable lists 100 failed requests among few and many
// processed ones.
func BenchmarkListReplayable(b *testing.B) {
	for _, processed := range []int{1_000, 1_000_000} {
		b.Run(strconv.Itoa(processed), func(b *testing.B) {
			ctx := context.Background()
			s := open(b, sqlite.Options{Path: filepath.Join(b.TempDir(), "ledger.db")})
			add := func(n int, verdict capture.Verdict, status int) {
				var items []ledger.Item
				var facts []ledger.Fact
				for range n {
					id := newID()
					items, facts = append(items, request(id, 0)), append(facts, outcome(id, verdict, status))
				}
				_, err := s.Record(ctx, items)
				require.NoError(b, err)
				_, err = s.Complete(ctx, facts)
				require.NoError(b, err)
			}
			for range 10 {
				add(10, capture.Failed, 503)
				for range processed / 1000 {
					add(100, capture.Processed, 200)
				}
			}
			for b.Loop() {
				page, err := s.List(ctx, ledger.Filter{Replayable: true}, "", 100)
				require.NoError(b, err)
				require.Len(b, page.Requests, 100)
			}
		})
	}
}
