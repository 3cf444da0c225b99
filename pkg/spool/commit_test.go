package spool_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/stretchr/testify/require"
)

var errDisk = errors.New("input/output error")

func (m *memFS) setFault(fault func(op, path string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fault = fault
}

func onMemFS(t *testing.T) (*memFS, *spool.Spool) {
	fs := newMemFS(1)
	o := small("/spool")
	o.FS = fs
	return fs, open(t, o)
}

func TestWaitSyncedWaitsForTheFsyncAndAppendWrittenDoesNot(t *testing.T) {
	fs, s := onMemFS(t)
	running, gate := make(chan struct{}, 100), make(chan struct{})
	fs.setFault(func(op, _ string) error {
		if op == "datasync" {
			running <- struct{}{}
			<-gate
		}
		return nil
	})
	r, err := s.Reserve(100, 1000)
	require.NoError(t, err)
	defer r.Release()
	p, err := r.Append([]byte("capture"))
	require.NoError(t, err)
	<-running
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, s.WaitSynced(stopped, p), context.Canceled, "the fsync has not returned")
	q, err := r.AppendWritten([]byte("outcome"))
	require.NoError(t, err)
	require.Equal(t, []string{"capture", "outcome"}, readAll(t, s))
	require.ErrorIs(t, s.WaitSynced(stopped, q), context.Canceled)
	require.Zero(t, s.Stats().SyncedIndex)

	// What comes during an fsync shares the next one.
	var wg sync.WaitGroup
	for range 50 {
		p, err := r.Append([]byte("x"))
		require.NoError(t, err)
		wg.Go(func() { require.NoError(t, s.WaitSynced(t.Context(), p)) })
	}
	close(gate)
	wg.Wait()
	require.NoError(t, s.WaitSynced(t.Context(), q))
	require.Equal(t, uint64(2), s.Stats().Commits)
}

func TestAnOutcomeIsSyncedSoonWithoutAnybodyAsking(t *testing.T) {
	fs, s := onMemFS(t)
	synced := make(chan struct{}, 10)
	fs.setFault(func(op, _ string) error {
		if op == "datasync" {
			synced <- struct{}{}
		}
		return nil
	})
	_, err := appendOne(s, []byte("outcome"), false)
	require.NoError(t, err)
	<-synced
}

func TestFsyncErrorGivesTheSegmentUpAndNothingElse(t *testing.T) {
	fs, s := onMemFS(t)
	safe := put(t, s, "safe")
	var bad atomic.Value
	bad.Store("")
	fs.setFault(func(op, path string) error {
		if op == "datasync" && bad.CompareAndSwap("", path) {
			return errDisk
		}
		if op == "datasync" && bad.Load() == path {
			return nil // it lies: the pages are gone
		}
		return nil
	})
	p, err := appendOne(s, []byte("doomed"), true)
	require.ErrorIs(t, err, errDisk)
	require.ErrorIs(t, err, spool.ErrBroken)
	require.ErrorIs(t, s.WaitSynced(t.Context(), p), errDisk, "asked again, the answer is the same")
	require.NoError(t, s.WaitSynced(t.Context(), safe))

	next := put(t, s, "fresh")
	require.NoError(t, s.WaitSynced(t.Context(), next))
	require.Equal(t, []string{"safe", "doomed", "fresh"}, readAll(t, s), "it stays readable")
	st := s.Stats()
	require.Equal(t, uint64(1), st.Failures)
	require.ErrorIs(t, st.LastError, errDisk)
	require.Equal(t, 2, st.Segments)

	// The suspect file loses what was not synced. That is no damage.
	fs.mu.Lock()
	f := fs.live[bad.Load().(string)]
	i := strings.Index(string(f.data), "doomed")
	clear(f.data[i-48 : i+8])
	fs.mu.Unlock()
	put(t, s, "more")
	o := small("/spool")
	o.FS = fs.crash(true)
	again := open(t, o)
	require.Equal(t, []string{"safe", "fresh", "more"}, readAll(t, again))
	again.Release(s.Start(), spool.Range{First: 0, Last: 99})
	require.NoError(t, again.Close())
}

func TestWriteErrorLosesOnlyWhatWasNotWritten(t *testing.T) {
	fs, s := onMemFS(t)
	put(t, s, "safe")
	var once atomic.Bool
	fs.setFault(func(op, path string) error {
		if op == "write" && strings.HasSuffix(path, ".seg") && once.CompareAndSwap(false, true) {
			return errDisk
		}
		return nil
	})
	_, err := appendOne(s, []byte("lost"), false)
	require.ErrorIs(t, err, errDisk)
	once.Store(false)
	_, err = appendOne(s, []byte("lost too"), true)
	require.ErrorIs(t, err, errDisk)
	put(t, s, "fresh")
	require.Equal(t, []string{"safe", "fresh"}, readAll(t, s))
	require.Equal(t, 2, s.Stats().Unreleased)
	require.Equal(t, 2, s.Release(s.Start(), spool.Range{First: 0, Last: 99}))
	require.NoError(t, s.Close(), "an error that has passed is none of Close's")
}

func TestABrokenDiskRefusesAndComesBack(t *testing.T) {
	fs, s := onMemFS(t)
	put(t, s, "before")
	fs.setFault(func(op, _ string) error {
		if op == "datasync" || op == "sync" {
			return errDisk
		}
		return nil
	})
	require.Eventually(t, func() bool {
		_, err := appendOne(s, []byte("x"), true)
		require.Error(t, err)
		_, err = s.Reserve(1, 1)
		return errors.Is(err, spool.ErrBroken) && errors.Is(err, errDisk)
	}, 10*time.Second, time.Millisecond, "Reserve says it before the API sees a byte")
	fs.setFault(nil)
	require.Eventually(t, func() bool {
		_, err := appendOne(s, []byte("after"), true)
		return err == nil
	}, 10*time.Second, time.Millisecond)
	data := readAll(t, s)
	require.Equal(t, "before", data[0])
	require.Equal(t, "after", data[len(data)-1])
	require.NoError(t, s.Close())
	require.Zero(t, fs.count(".tmp"))
}

func TestManyAppendersRollAndReadAtOnce(t *testing.T) {
	s := open(t, small(t.TempDir()))
	const writers, each = 16, 200
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var wg sync.WaitGroup
	for w := range uint64(writers) {
		wg.Go(func() {
			for n := range uint64(each) {
				if _, err := appendOne(s, payload(w<<32|n), n%3 != 0); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	seen := map[uint64]bool{}
	r := s.NewReader()
	for index := uint64(1); len(seen) < writers*each; index++ {
		rec, err := r.Next(ctx)
		require.NoError(t, err, "%v", context.Cause(ctx))
		require.Equal(t, index, rec.Position.Index)
		seen[payloadID(t, rec.Data)] = true
		if index%5 == 0 {
			s.Release(rec.Position.Start, spool.Range{First: index - 4, Last: index})
		}
	}
	wg.Wait()
	require.Zero(t, s.Stats().Unreleased)
	require.Zero(t, s.Stats().ReservedBytes)
}

func TestASpoolWithoutRoomOpensAndWaitsForIt(t *testing.T) {
	fs := newMemFS(1)
	fs.limit = 1
	o := small("/spool")
	o.FS = fs
	s := open(t, o)
	_, err := s.Reserve(1, 1)
	require.ErrorIs(t, err, spool.ErrFull)
	fs.mu.Lock()
	fs.limit = 0
	fs.mu.Unlock()
	require.Eventually(t, func() bool {
		_, err := appendOne(s, []byte("x"), true)
		return err == nil
	}, 10*time.Second, time.Millisecond)
	_, err = fs.Open(filepath.Join("/spool", "none"))
	require.Error(t, err)
}
