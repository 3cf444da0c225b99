package spool_test

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"

	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/stretchr/testify/require"
)

// newSeed returns a seed for a test with chance in it, and prints it. To run a
// failure again set HOLDFAST_TEST_SEED.
func newSeed(t *testing.T) uint64 {
	seed := rand.Uint64() >> 33
	if given := os.Getenv("HOLDFAST_TEST_SEED"); given != "" {
		var err error
		seed, err = strconv.ParseUint(given, 10, 31)
		require.NoError(t, err)
	}
	t.Logf("seed %d", seed)
	return seed
}

// promises are the records that must be there, by position.
type promises map[spool.Position]uint64

// check reads everything and returns what it found.
func (p promises) check(t *testing.T, s *spool.Spool) map[spool.Position]uint64 {
	found := map[spool.Position]uint64{}
	r := s.NewReader()
	for {
		rec, ok, err := r.TryNext()
		require.NoError(t, err)
		if !ok {
			break
		}
		_, twice := found[rec.Position]
		require.False(t, twice)
		found[rec.Position] = payloadID(t, rec.Data)
	}
	for position, id := range p {
		got, ok := found[position]
		require.True(t, ok, "%v was promised, but is gone", position)
		require.Equal(t, id, got)
	}
	require.Equal(t, len(found), s.Stats().Unreleased)
	return found
}

func TestKill9LosesNothingThatWasPromised(t *testing.T) {
	seed := newSeed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	self, err := os.Executable()
	require.NoError(t, err)
	promised := promises{}
	for round := range uint64(8) {
		child := exec.Command(self)
		child.Args = []string{self, dir, strconv.FormatUint(seed+round, 10)}
		child.Env = append(os.Environ(), childMode+"=append")
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, child.Start())
		lines := bufio.NewScanner(out)
		for n, kill := 0, 1+rng.IntN(800); lines.Scan(); n++ {
			if n == kill {
				require.NoError(t, child.Process.Kill())
			}
			// Also what it said between the kill and its death counts.
			var start string
			var position spool.Position
			var id uint64
			if k, err := fmt.Sscanf(lines.Text(), "%s %d %d", &start, &position.Index, &id); k == 3 && err == nil {
				raw, err := hex.DecodeString(start)
				require.NoError(t, err)
				position.Start = spool.StartID(raw)
				// The last line may be cut within its last number.
				if old, ok := promised[position]; !ok || old == id {
					promised[position] = id
				}
			}
		}
		require.NoError(t, lines.Err())
		require.ErrorContains(t, child.Wait(), "killed")

		s := open(t, small(dir))
		found := promised.check(t, s)
		if round%2 == 1 { // release half of it, with every record of some segments
			for position := range found {
				if position.Index%3 != 0 || position.Index < 200 {
					s.Release(position.Start, spool.Range{First: position.Index, Last: position.Index})
					delete(promised, position)
				}
			}
			require.NoError(t, s.Close())
			s = open(t, small(dir))
			for position := range found { // lost words may bring records back, nothing else
				if _, ok := promised[position]; !ok {
					s.Release(position.Start, spool.Range{First: position.Index, Last: position.Index})
				}
			}
			promised.check(t, s)
		}
		require.NoError(t, s.Close())
	}
	require.NotEmpty(t, promised)
}

// TestPowerLossLosesNothingThatWasSynced cuts the power at seeded operations of
// the file system, or kills the process, again and again on one directory.
func TestPowerLossLosesNothingThatWasSynced(t *testing.T) {
	seed := newSeed(t)
	rounds := 60
	if testing.Short() {
		rounds = 15
	}
	for round := range rounds {
		powerRound(t, seed+uint64(round)<<31)
	}
}

func powerRound(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 3))
	fs := newMemFS(seed)
	o := small("/spool")
	o.SegmentBytes, o.MaxBytes, o.MaxRecordBytes = 24<<10, 512<<10, 2<<10
	synced, written, known := promises{}, promises{}, promises{}
	id := seed
	for generation := range 6 {
		power := rng.IntN(3) > 0 // goes
		fs.cutAfter(10 + rng.IntN(400))
		o.FS = fs
		s, err := spool.Open(o)
		if err != nil {
			require.ErrorIs(t, err, errPower, "seed %d, generation %d", seed, generation)
			fs = fs.crash(!power)
			continue
		}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range 4 {
			wg.Add(1)
			next := id + 1
			id += 1000
			wRng := rand.New(rand.NewPCG(rng.Uint64(), 4))
			go func() {
				defer wg.Done()
				for ; ; next++ {
					wantSync := wRng.IntN(3) > 0
					p, err := appendOne(s, payload(next), wantSync)
					mu.Lock()
					if p.Index > 0 {
						known[p] = next
					}
					if err == nil && wantSync {
						synced[p] = next
					} else if err == nil {
						written[p] = next
					}
					if err == nil && wRng.IntN(4) == 0 || errors.Is(err, spool.ErrFull) {
						// A word for some that are known, of any start.
						n := 0
						for q := range known {
							delete(synced, q)
							delete(written, q)
							delete(known, q)
							s.Release(q.Start, spool.Range{First: q.Index, Last: q.Index})
							if n++; n > 4 {
								break
							}
						}
						if !fs.isOff() {
							err = nil
						}
					}
					mu.Unlock()
					if err != nil {
						return
					}
				}
			}()
		}
		wg.Wait()
		_ = s.Close() // the power is off: it can only fail, but it must end
		fs = fs.crash(!power)
		o.FS = fs
		if again, err := spool.Open(o); err != nil {
			require.NoError(t, err, "seed %d, generation %d", seed, generation)
		} else {
			if !power {
				for q, n := range written {
					synced[q] = n
				}
			}
			written = promises{}
			found := synced.check(t, again)
			for q, n := range known {
				if got, ok := found[q]; ok {
					require.Equal(t, n, got)
				}
			}
			known = found // also what came back although it was released
			require.NoError(t, again.Close())
		}
		fs = fs.crash(true)
	}
}

func TestFullRealDisk(t *testing.T) {
	dir := t.TempDir()
	if err := mountTmpfs(dir, 600<<10); err != nil {
		t.Logf("no tmpfs here (%v): TestFullDiskIsFullUntilThereIsRoom has run the same in memory", err)
		return
	}
	t.Log("on a tmpfs of 600 KiB")
	t.Cleanup(func() { require.NoError(t, unmount(dir)) })
	// Something else takes most of it, and later goes.
	ballast := dir + "/ballast"
	require.NoError(t, os.WriteFile(ballast, make([]byte, 250<<10), 0o600))
	s := open(t, small(dir+"/spool"))
	fillAndRecover(t, s, func() { require.NoError(t, os.Remove(ballast)) })
	s = open(t, small(dir+"/spool"))
	require.NotZero(t, s.Stats().Unreleased)
	oldest, _, _ := s.Oldest()
	s.Release(oldest.Start, spool.Range{First: 0, Last: ^uint64(0)})
	require.Zero(t, s.Stats().Unreleased)
	require.NoError(t, s.Close())
}
