package spool_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

type modelRecord struct {
	position spool.Position
	data     string
	synced   bool
	released bool
}

// TestModel compares a spool with a list of records over any sequence of calls,
// kills and power cuts.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		fs := newMemFS(rapid.Uint64().Draw(rt, "seed"))
		o := small("/spool")
		o.SegmentBytes, o.MaxBytes, o.MaxRecordBytes = 24<<10, 1<<20, 2<<10
		reopen := func() *spool.Spool {
			o.FS = fs
			s, err := spool.Open(o)
			require.NoError(rt, err)
			return s
		}
		s := reopen()
		defer func() { require.NoError(rt, s.Close()) }()
		reader := s.NewReader()
		next := 0 // in records
		var records []modelRecord
		number := 0

		unread := func() (want []string) {
			for _, r := range records[next:] {
				if !r.released {
					want = append(want, r.data)
				}
			}
			return want
		}
		pick := func() int {
			if len(records) == 0 {
				rt.Skip("no records")
			}
			return rapid.IntRange(0, len(records)-1).Draw(rt, "record")
		}
		// restart takes over what a crash has left.
		restart := func(power bool) {
			fs = fs.crash(power)
			_ = s.Close() // its file system is gone
			s = reopen()
			got, positions := rest(rt, s.NewReader())
			var left []modelRecord
			for _, r := range records {
				i := slices.Index(positions, r.position)
				switch {
				case i >= 0:
					require.Equal(rt, r.data, got[i])
					r.released = false
					r.synced = true // what Open finds is durable
					left = append(left, r)
				case !r.released:
					require.False(rt, power || r.synced, "lost %v", r.position)
				}
			}
			require.Equal(rt, len(got), len(left))
			records, next, reader = left, 0, s.NewReader()
		}
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				data := fmt.Sprintf("%d %*d", number, rapid.IntRange(0, 1900).Draw(rt, "size"), 0)
				number++
				synced := rapid.Bool().Draw(rt, "synced")
				p, err := appendOne(s, []byte(data), synced)
				require.NoError(rt, err)
				if synced { // and so is all before it
					for i := range records {
						records[i].synced = records[i].synced || records[i].position.Start == p.Start
					}
				}
				records = append(records, modelRecord{position: p, data: data, synced: synced})
			},
			"read": func(rt *rapid.T) {
				want := unread()
				n := rapid.IntRange(0, len(want)).Draw(rt, "n")
				for _, data := range want[:n] {
					rec, err := reader.Next(t.Context())
					require.NoError(rt, err)
					// A record released since the reader has looked may still come.
					for string(rec.Data) != data {
						i := slices.IndexFunc(records, func(r modelRecord) bool { return r.position == rec.Position })
						require.True(rt, i >= 0 && records[i].released, "unexpected %v", rec.Position)
						rec, err = reader.Next(t.Context())
						require.NoError(rt, err)
					}
					for records[next].data != data {
						next++
					}
					next++
				}
			},
			"rewind": func(rt *rapid.T) {
				i := pick()
				if records[i].released {
					rt.Skip("where it was need not be known any more")
				}
				next = i
				reader.Rewind(records[next].position)
			},
			"release": func(rt *rapid.T) {
				i := pick()
				p := records[i].position
				r := spool.Range{First: p.Index, Last: p.Index + rapid.Uint64Range(0, 20).Draw(rt, "more")}
				want := 0
				for j := range records {
					q := &records[j]
					if q.position.Start == p.Start && q.position.Index >= r.First && q.position.Index <= r.Last && !q.released {
						q.released = true
						want++
					}
				}
				require.Equal(rt, want, s.Release(p.Start, r))
			},
			"foreign word": func(*rapid.T) {
				require.Zero(rt, s.Release(spool.StartID{1}, spool.Range{First: 0, Last: ^uint64(0)}))
			},
			"kill":  func(*rapid.T) { restart(true) },
			"power": func(*rapid.T) { restart(false) },
			"close": func(*rapid.T) {
				require.NoError(rt, s.Close())
				for i := range records {
					records[i].synced = true
				}
				restart(true)
			},
			"": func(*rapid.T) {
				want, oldest := 0, spool.Position{}
				for _, r := range records {
					if !r.released {
						if want++; want == 1 {
							oldest = r.position
						}
					}
				}
				st := s.Stats()
				require.Equal(rt, want, st.Unreleased)
				require.Zero(rt, st.ReservedBytes)
				require.LessOrEqual(rt, st.Bytes, st.MaxBytes)
				p, at, ok := s.Oldest()
				require.Equal(rt, want > 0, ok)
				require.Equal(rt, oldest, p)
				require.Equal(rt, want == 0, at.IsZero())
			},
		})
		next = 0
		require.Equal(rt, unread(), readAll(rt, s))
	})
}
