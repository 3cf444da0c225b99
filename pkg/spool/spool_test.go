package spool_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/stretchr/testify/require"
)

func TestRecordsComeBackInOrderUntilTheyAreReleased(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	var want []string
	var all []spool.Position
	for i := range 500 { // several segments
		want = append(want, fmt.Sprintf("%d %s", i, strings.Repeat("x", i)))
		all = append(all, put(t, s, want[i]))
	}
	require.Greater(t, s.Stats().Segments, 2)
	data, positions := rest(t, s.NewReader())
	require.Equal(t, want, data)
	require.Equal(t, all, positions)
	require.NoError(t, s.Close())
	require.NoError(t, s.Close())

	again := open(t, small(dir))
	require.NotEqual(t, s.Start(), again.Start())
	put(t, again, "live")
	data, positions = rest(t, again.NewReader())
	require.Equal(t, append(want, "live"), data)
	require.Equal(t, all, positions[:len(all)], "old records keep their start and index")
	require.Equal(t, 500, again.Release(s.Start(), spool.Range{First: 1, Last: 500}))
	require.Equal(t, []string{"live"}, readAll(t, again))
	require.NoError(t, again.Close())
	require.Equal(t, []string{"live"}, readAll(t, open(t, small(dir))))
}

func TestEmptyAndLargestRecords(t *testing.T) {
	s := open(t, small(t.TempDir()))
	big := strings.Repeat("b", 4<<10)
	put(t, s, "")
	put(t, s, big)
	require.Equal(t, []string{"", big}, readAll(t, s))
	_, err := s.Reserve(1, 4<<10+1)
	require.ErrorIs(t, err, spool.ErrTooLarge)
	r, err := s.Reserve(2, 5<<10)
	require.NoError(t, err)
	defer r.Release()
	_, err = r.Append(make([]byte, 4<<10+1))
	require.ErrorIs(t, err, spool.ErrTooLarge)
	_, err = r.Append(make([]byte, 4<<10))
	require.NoError(t, err)
	_, err = r.Append(make([]byte, 2<<10))
	require.ErrorIs(t, err, spool.ErrReservation)
}

func TestReleaseCountsEachRecordOnce(t *testing.T) {
	s := open(t, small(t.TempDir()))
	for i := range 200 {
		put(t, s, fmt.Sprint(i))
	}
	start := s.Start()
	foreign := start
	foreign[3]++
	require.Zero(t, s.Release(foreign, spool.Range{First: 0, Last: 1 << 62}))
	require.Zero(t, s.Release(start, spool.Range{First: 201, Last: ^uint64(0)}, spool.Range{First: 9, Last: 8}))
	require.Equal(t, 200, s.Stats().Unreleased)

	require.Equal(t, 3, s.Release(start, spool.Range{First: 100, Last: 102}))
	require.Equal(t, 2, s.Release(start, spool.Range{First: 99, Last: 103}))
	require.Zero(t, s.Release(start, spool.Range{First: 100, Last: 102}))
	require.Equal(t, 195, s.Stats().Unreleased)
	p, at, ok := s.Oldest()
	require.True(t, ok)
	require.Equal(t, spool.Position{Start: start, Index: 1}, p)
	require.WithinDuration(t, time.Now(), at, time.Minute)
	data := readAll(t, s)
	require.Len(t, data, 195)
	require.Equal(t, []string{"97", "103"}, data[97:99])

	require.Equal(t, 195, s.Release(start, spool.Range{First: 0, Last: ^uint64(0)}))
	_, _, ok = s.Oldest()
	require.False(t, ok)
	require.True(t, s.Stats().OldestUnreleased.IsZero())
	require.Empty(t, readAll(t, s))
}

func TestAWordAfterARestartDoesNotReleaseTheSameIndexOfTheNewStart(t *testing.T) {
	dir := t.TempDir()
	first := open(t, small(dir))
	put(t, first, "old")
	require.NoError(t, first.Close())
	s := open(t, small(dir))
	put(t, s, "new")
	require.Equal(t, 1, s.Release(first.Start(), spool.Range{First: 1, Last: 1}))
	require.Equal(t, []string{"new"}, readAll(t, s))
}

func TestSegmentsAreFreedInAnyOrderAndRecycled(t *testing.T) {
	fs := newMemFS(1)
	o := small("/spool")
	o.FS = fs
	s := open(t, o)
	fill := func() uint64 { // returns the first index of the next segment
		n := s.Stats().Segments
		for {
			p := put(t, s, strings.Repeat("x", 4000))
			if s.Stats().Segments > n {
				return p.Index
			}
		}
	}
	put(t, s, "first")
	second := fill()
	third := fill()
	fill()
	segments := s.Stats().Segments
	// The one in the middle goes, the first stays.
	s.Release(s.Start(), spool.Range{First: second, Last: third - 1})
	require.Equal(t, segments-1, s.Stats().Segments)
	require.NotZero(t, s.Release(s.Start(), spool.Range{First: 1, Last: second - 1}))
	require.Equal(t, segments-2, s.Stats().Segments)

	// At a steady pace the files that are there suffice.
	bytes := s.Stats().Bytes
	for range 400 {
		p := put(t, s, strings.Repeat("y", 4000))
		s.Release(p.Start, spool.Range{First: 0, Last: p.Index})
	}
	require.LessOrEqual(t, s.Stats().Bytes, max(bytes, 8*64<<10))
	s.Release(s.Start(), spool.Range{First: 0, Last: ^uint64(0)})
	require.NoError(t, s.Close())
	require.Zero(t, fs.count(".seg")+fs.count(".free")+fs.count(".tmp"), "an empty spool leaves no files")
}

func TestReaderWaitsForWrittenRecords(t *testing.T) {
	s := open(t, small(t.TempDir()))
	r := s.NewReader()
	got := make(chan string)
	go func() {
		defer close(got)
		for {
			rec, err := r.Next(t.Context())
			if err != nil {
				return
			}
			got <- string(rec.Data)
		}
	}()
	for i := range 100 {
		put(t, s, fmt.Sprint(i))
		require.Equal(t, fmt.Sprint(i), <-got)
	}
	require.NoError(t, s.Close())
	_, open := <-got
	require.False(t, open, "closing the spool ends Next")
	_, err := r.Next(t.Context())
	require.ErrorIs(t, err, spool.ErrClosed)

	s = fresh(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = s.NewReader().Next(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

func fresh(t *testing.T) *spool.Spool { return open(t, small(t.TempDir())) }

func TestRewind(t *testing.T) {
	dir := t.TempDir()
	old := open(t, small(dir))
	var positions []spool.Position
	var want []string
	for i := range 150 {
		want = append(want, fmt.Sprintf("old %d %s", i, strings.Repeat("x", 700)))
		positions = append(positions, put(t, old, want[i]))
	}
	require.NoError(t, old.Close())
	s := open(t, small(dir))
	for i := range 150 {
		want = append(want, fmt.Sprintf("new %d %s", i, strings.Repeat("x", 700)))
		positions = append(positions, put(t, s, want[150+i]))
	}
	r := s.NewReader()
	rest(t, r)
	for i := range positions {
		r.Rewind(positions[i])
		rec, ok, err := r.TryNext()
		require.NoError(t, err)
		require.True(t, ok)
		require.Equal(t, positions[i], rec.Position)
		require.Equal(t, want[i], string(rec.Data))
	}
	s.Release(old.Start(), spool.Range{First: 41, Last: 149})
	r.Rewind(positions[60])
	data, _ := rest(t, r)
	require.Equal(t, want[149:], data, "released records are passed over")
	r.Rewind(spool.Position{})
	data, _ = rest(t, r)
	require.Equal(t, append(want[:40:40], want[149:]...), data, "an unknown start means the begin")

	r.Rewind(positions[30])
	r.Until(positions[200])
	for i := 30; ; i++ {
		if i == 40 {
			i = 149
		}
		rec, err := r.Next(t.Context())
		if i == 201 {
			require.ErrorIs(t, err, io.EOF)
			break
		}
		require.NoError(t, err)
		require.Equal(t, want[i], string(rec.Data))
	}
}

func TestUnreleasedBefore(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	for i := range 40 {
		put(t, s, fmt.Sprint(i))
	}
	middle := time.Now()
	for !time.Now().After(middle) { // the clock's own grain
		runtime.Gosched()
	}
	put(t, s, "late")
	s.Release(s.Start(), spool.Range{First: 1, Last: 35})
	r := s.UnreleasedBefore(middle)
	var got []string
	for {
		rec, err := r.Next(t.Context())
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		require.True(t, rec.AppendedAt.Before(middle))
		got = append(got, string(rec.Data))
	}
	require.Equal(t, []string{"35", "36", "37", "38", "39"}, got)
	for range 2 { // the second time it is an earlier start's
		_, err := s.UnreleasedBefore(time.Unix(1, 0)).Next(t.Context())
		require.ErrorIs(t, err, io.EOF)
		require.NoError(t, s.Close())
		s = open(t, small(dir))
	}
}

func TestSetAside(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	put(t, s, "good")
	p := put(t, s, "bad record")
	require.NoError(t, s.SetAside(p, "subject is \xff wrong"))
	require.NoError(t, s.SetAside(p, "again"))
	require.NoError(t, s.SetAside(spool.Position{}, "unknown"))
	require.Equal(t, []string{"good"}, readAll(t, s))
	require.NoError(t, s.Close())

	s = open(t, small(dir))
	require.Equal(t, 1, s.Stats().Aside)
	list, err := s.Aside()
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, p.Start.String(), list[0].Start)
	require.Equal(t, p.Index, list[0].Index)
	require.Equal(t, "subject is ? wrong", list[0].Reason)
	content, err := os.ReadFile(list[0].Path)
	require.NoError(t, err)
	require.True(t, strings.HasSuffix(string(content), "\nbad record"))
	info, err := os.Stat(list[0].Path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())
}

func TestAsideIsBoundedAndNothingIsDropped(t *testing.T) {
	o := small(t.TempDir())
	o.MaxBytes = 3 * o.SegmentBytes // 48 KiB aside
	s := open(t, o)
	var last spool.Position
	full := false
	for i := 0; !full; i++ {
		require.Less(t, i, 30)
		last = put(t, s, strings.Repeat("x", 4000))
		err := s.SetAside(last, "no")
		full = errors.Is(err, spool.ErrAsideFull)
		require.True(t, full || err == nil, "%v", err)
	}
	require.Len(t, readAll(t, s), 1, "it stays in the spool")
	list, err := s.Aside()
	require.NoError(t, err)
	require.NoError(t, os.Remove(list[0].Path))
	require.NoError(t, s.SetAside(last, "no"), "removing a file makes room without a restart")
}

func TestReservationsAreKeptToTheLastByte(t *testing.T) {
	o := small(t.TempDir())
	o.MaxBytes = 8 * o.SegmentBytes
	s := open(t, o)
	var held []*spool.Reservation
	for {
		r, err := s.Reserve(2, 5000)
		if err != nil {
			require.ErrorIs(t, err, spool.ErrFull)
			break
		}
		held = append(held, &r)
	}
	require.Greater(t, len(held), 50)
	require.LessOrEqual(t, s.Stats().Bytes, o.MaxBytes)
	reserved := s.Stats().ReservedBytes
	held[0].Release()
	held[0].Release()
	require.Less(t, s.Stats().ReservedBytes, reserved)
	var wg sync.WaitGroup
	for _, r := range held[1:] { // sizes that pack badly
		wg.Go(func() {
			_, err := r.Append(make([]byte, 3900))
			require.NoError(t, err)
			_, err = r.AppendWritten(make([]byte, 1100))
			require.NoError(t, err)
			r.Release()
		})
	}
	wg.Wait()
	require.Zero(t, s.Stats().ReservedBytes)
	require.LessOrEqual(t, s.Stats().Bytes, o.MaxBytes)
	require.Len(t, readAll(t, s), 2*(len(held)-1))

	_, err := s.Reserve(200, 200*4000)
	require.ErrorIs(t, err, spool.ErrFull)
	s.Release(s.Start(), spool.Range{First: 0, Last: ^uint64(0)})
	require.Eventually(t, func() bool {
		r, err := s.Reserve(2, 5000)
		r.Release()
		return err == nil
	}, 10*time.Second, time.Millisecond)
}

func TestWhateverIsGrantedFits(t *testing.T) {
	o := small(t.TempDir())
	o.MaxBytes = 3 * o.SegmentBytes
	s := open(t, o)
	granted := 0
	// Ever smaller records go into what is left of the last segment.
	for size := 4096; size > 0; {
		r, err := s.Reserve(1, int64(size))
		if err != nil {
			require.ErrorIs(t, err, spool.ErrFull)
			size -= 4
			continue
		}
		_, err = r.AppendWritten(make([]byte, size))
		require.NoError(t, err, "%d bytes", size)
		granted++
	}
	require.Greater(t, granted, 30)
	require.Len(t, readAll(t, s), granted)
}

func TestAnIdleSpoolHoldsNothingBack(t *testing.T) {
	o := small(t.TempDir())
	o.MaxBytes = 3 * o.SegmentBytes
	s := open(t, o)
	for range 20 { // what one segment has used must not be missing at the end
		r, err := s.Reserve(28, 28*4000)
		require.NoError(t, err)
		for range 28 {
			p, err := r.Append(make([]byte, 4000))
			require.NoError(t, err)
			require.NoError(t, s.WaitSynced(t.Context(), p))
		}
		r.Release()
		s.Release(s.Start(), spool.Range{First: 0, Last: ^uint64(0)})
	}
}

func TestFullDiskIsFullUntilThereIsRoom(t *testing.T) {
	fs := newMemFS(1)
	fs.limit = 5 * 64 << 10
	o := small("/spool")
	o.FS = fs
	s := open(t, o)
	fillAndRecover(t, s, func() {
		fs.mu.Lock()
		defer fs.mu.Unlock()
		fs.limit *= 2
	})
}

// fillAndRecover fills a disk by reservations, uses them all, makes room, and
// goes on.
func fillAndRecover(t *testing.T, s *spool.Spool, makeRoom func()) {
	var held []*spool.Reservation
	for {
		r, err := s.Reserve(1, 3000)
		if err != nil {
			require.ErrorIs(t, err, spool.ErrFull)
			break
		}
		held = append(held, &r)
	}
	require.Greater(t, len(held), 20)
	for _, r := range held {
		p, err := r.Append(make([]byte, 3000))
		require.NoError(t, err)
		require.NoError(t, s.WaitSynced(t.Context(), p))
	}
	require.Len(t, readAll(t, s), len(held))
	makeRoom()
	require.Eventually(t, func() bool {
		r, err := s.Reserve(1, 3000)
		r.Release()
		return err == nil
	}, 10*time.Second, 5*time.Millisecond)
	put(t, s, "after")
	require.Len(t, readAll(t, s), len(held)+1)
	require.NoError(t, s.Close())
}

func TestOnlyOneProcessHasTheDirectory(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	_, err := spool.Open(small(dir))
	require.ErrorIs(t, err, spool.ErrLocked)
	require.ErrorContains(t, err, dir)

	self, err := os.Executable()
	require.NoError(t, err)
	other := exec.Command(self)
	other.Args = []string{self, dir}
	other.Env = append(os.Environ(), childMode+"=open")
	out, err := other.Output()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 3, exit.ExitCode())
	require.Contains(t, string(out), dir)
	put(t, s, "undisturbed")
	require.NoError(t, s.Close())

	other = exec.Command(self)
	other.Args = []string{self, dir}
	other.Env = append(os.Environ(), childMode+"=open")
	require.NoError(t, other.Run())
}

func TestFilesAreForTheirOwnerAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "spool")
	s := open(t, small(dir))
	put(t, s, "secret")
	require.NoError(t, s.Close())
	info, err := os.Stat(dir)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), info.Mode().Perm())
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.NotEmpty(t, entries)
	for _, e := range entries {
		info, err := e.Info()
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode(), e.Name())
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for _, change := range []func(*spool.Options){
		func(o *spool.Options) { o.Dir = "" },
		func(o *spool.Options) { o.SegmentBytes = 5000 },
		func(o *spool.Options) { o.SegmentBytes = 4096 },
		func(o *spool.Options) { o.SegmentBytes = 2 << 30 },
		func(o *spool.Options) { o.MaxRecordBytes = -1 },
		func(o *spool.Options) { o.MaxBytes = 2 * o.SegmentBytes },
	} {
		o := small(t.TempDir())
		change(&o)
		_, err := spool.Open(o)
		require.Error(t, err)
	}
	s := open(t, spool.Options{Dir: t.TempDir(), MaxBytes: 16 << 20})
	require.LessOrEqual(t, s.Stats().Bytes, int64(16<<20))
	require.Equal(t, int64(16<<20), s.Stats().MaxBytes)
}

func TestAfterClose(t *testing.T) {
	s := fresh(t)
	r, err := s.Reserve(2, 10)
	require.NoError(t, err)
	p, err := r.Append([]byte("x"))
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.NoError(t, s.WaitSynced(t.Context(), p), "Close has made it durable")
	_, err = r.Append([]byte("y"))
	require.ErrorIs(t, err, spool.ErrClosed)
	_, err = r.AppendWritten([]byte("y"))
	require.ErrorIs(t, err, spool.ErrClosed)
	_, err = s.Reserve(1, 1)
	require.ErrorIs(t, err, spool.ErrClosed)
	require.ErrorIs(t, s.SetAside(p, "late"), spool.ErrClosed)
	r.Release()
}
