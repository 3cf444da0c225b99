package spool_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// childMode makes the test binary play a second process.
const childMode = "HOLDFAST_SPOOL_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childMode) {
	case "":
		goleak.VerifyTestMain(m)
	case "open":
		s, err := spool.Open(spool.Options{Dir: os.Args[1]})
		if err == nil {
			err = s.Close()
		}
		fmt.Println(err)
		if errors.Is(err, spool.ErrLocked) {
			os.Exit(3)
		}
	case "append":
		if err := childAppend(os.Args[1], os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// childAppend appends until it is killed and says on stdout what is promised.
func childAppend(dir, seedText string) error {
	seed, err := strconv.ParseUint(seedText, 10, 64)
	if err != nil {
		return err
	}
	s, err := spool.Open(small(dir))
	if err != nil {
		return err
	}
	var mu sync.Mutex
	out := bufio.NewWriter(os.Stdout)
	errs := make(chan error)
	for w := range uint64(8) {
		go func() {
			rng := rand.New(rand.NewPCG(seed, w))
			for n := uint64(0); ; n++ {
				id := seed<<32 | w<<24 | n
				synced := rng.IntN(2) == 0
				p, err := appendOne(s, payload(id), synced)
				if err == nil {
					mu.Lock()
					_, err = fmt.Fprintf(out, "%s %d %d\n", p.Start, p.Index, id)
					err = errors.Join(err, out.Flush())
					mu.Unlock()
				}
				if err != nil {
					errs <- err
				}
			}
		}()
	}
	return <-errs
}

func appendOne(s *spool.Spool, data []byte, synced bool) (spool.Position, error) {
	r, err := s.Reserve(1, int64(len(data)))
	if err != nil {
		return spool.Position{}, err
	}
	defer r.Release()
	if !synced {
		return r.AppendWritten(data)
	}
	p, err := r.Append(data[:len(data)/2], data[len(data)/2:])
	if err != nil {
		return p, err
	}
	return p, s.WaitSynced(context.Background(), p)
}

// payload is a content that says by itself whether it is whole.
func payload(id uint64) []byte {
	rng := rand.New(rand.NewPCG(id, 1))
	b := make([]byte, 12+rng.IntN(900))
	binary.LittleEndian.PutUint64(b, id)
	for i := 12; i < len(b); i++ {
		b[i] = byte(rng.Uint32())
	}
	sum := crc32.ChecksumIEEE(b[12:])
	binary.LittleEndian.PutUint32(b[8:], sum)
	return b
}

func payloadID(t require.TestingT, b []byte) uint64 {
	require.GreaterOrEqual(t, len(b), 12)
	id := binary.LittleEndian.Uint64(b)
	require.Equal(t, payload(id), b)
	return id
}

// small has segments of 64 KiB, so that a test meets many of them.
func small(dir string) spool.Options {
	return spool.Options{Dir: dir, MaxBytes: 64 << 20, SegmentBytes: 64 << 10, MaxRecordBytes: 4 << 10}
}

func open(t *testing.T, o spool.Options) *spool.Spool {
	t.Helper()
	s, err := spool.Open(o)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() }) // where it matters the test has looked at it
	return s
}

func put(t require.TestingT, s *spool.Spool, data string) spool.Position {
	p, err := appendOne(s, []byte(data), true)
	require.NoError(t, err)
	return p
}

// rest reads what is there without waiting.
func rest(t require.TestingT, r *spool.Reader) (data []string, positions []spool.Position) {
	for {
		rec, ok, err := r.TryNext()
		require.NoError(t, err)
		if !ok {
			return data, positions
		}
		data, positions = append(data, string(rec.Data)), append(positions, rec.Position)
	}
}

func readAll(t require.TestingT, s *spool.Spool) []string {
	data, _ := rest(t, s.NewReader())
	return data
}
