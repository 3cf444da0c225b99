package stream

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// Whatever the server says, what is purged was acknowledged, the purge has an
// end below the last message, and steps end.
func TestTrimmingNeverTouchesWhatIsNotAcknowledged(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	rapid.Check(t, func(t *rapid.T) {
		first := rapid.Uint64Range(0, 1<<40).Draw(t, "first")
		s := jetstream.StreamState{
			FirstSeq: first,
			LastSeq:  first + rapid.Uint64Range(0, 1<<20).Draw(t, "span"),
			Bytes:    rapid.Uint64Range(0, 1<<40).Draw(t, "bytes"),
			// Clocks of servers may run backwards.
			FirstTime: now.Add(time.Duration(rapid.Int64Range(-1e15, 1e12).Draw(t, "first time"))),
			LastTime:  now.Add(time.Duration(rapid.Int64Range(-1e15, 1e12).Draw(t, "last time"))),
		}
		s.Msgs = rapid.Uint64Range(0, s.LastSeq-s.FirstSeq+1).Draw(t, "messages")
		floor := rapid.Uint64Range(0, s.LastSeq+100).Draw(t, "floor")
		maxBytes := rapid.Int64Range(-1, 1<<40).Draw(t, "max bytes")
		for range 1000 {
			keep := firstToKeep(s, maxBytes, floor, now.Add(-24*time.Hour))
			if keep == 0 {
				return
			}
			require.Greater(t, keep, s.FirstSeq, "a purge that does nothing, or of sequence 0, which empties the stream")
			require.LessOrEqual(t, keep, floor+1, "purges what is not acknowledged")
			require.LessOrEqual(t, floor, s.LastSeq, "trusts an ack floor of before a rollback")
			require.LessOrEqual(t, keep, s.LastSeq, "empties the stream")
			s.Bytes -= s.Bytes / (s.LastSeq - s.FirstSeq + 1) * (keep - s.FirstSeq)
			s.FirstSeq = keep
		}
		require.FailNow(t, "does not end")
	})
}

func TestTrimmingKeepsTheWindow(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	hour := func(n int) time.Time { return now.Add(-time.Duration(n) * time.Hour) }
	state := func(first, last uint64, bytes uint64, from, to time.Time) jetstream.StreamState {
		return jetstream.StreamState{Msgs: last - first + 1, FirstSeq: first, LastSeq: last, Bytes: bytes, FirstTime: from, LastTime: to}
	}
	for name, c := range map[string]struct {
		state jetstream.StreamState
		floor uint64
		want  uint64
	}{
		"young and small":                  {state(1, 1000, 400, hour(20), now), 1000, 0},
		"half is older than a day":         {state(1, 1000, 400, hour(48), now), 1000, 251},
		"all is older than a day":          {state(1, 1000, 400, hour(72), hour(48)), 1000, 501},
		"more than half of the bytes":      {state(1, 1000, 800, hour(1), now), 1000, 188},
		"full, and little is committed":    {state(1, 1000, 1000, hour(1), now), 10, 11},
		"old, and nothing is committed":    {state(1, 1000, 1000, hour(48), now), 0, 0},
		"the floor is before the first":    {state(100, 1000, 1000, hour(48), now), 99, 0},
		"the floor is past the end":        {state(1, 1000, 1000, hour(48), now), 1001, 0},
		"empty":                            {jetstream.StreamState{FirstSeq: 1001, LastSeq: 1000}, 1000, 0},
		"one message, old":                 {state(7, 7, 10, hour(48), hour(48)), 7, 0},
		"two messages, old":                {state(7, 8, 10, hour(48), hour(48)), 8, 8},
		"a little too old is not worth it": {state(1, 1000, 10, now.Add(-24*time.Hour-time.Minute), now), 1000, 0},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, c.want, firstToKeep(c.state, 1000, c.floor, hour(24)))
		})
	}
}

func TestIndexesBecomeRanges(t *testing.T) {
	require.Nil(t, merge(nil))
	require.Equal(t, [][2]uint64{{7, 7}}, merge([]uint64{7, 7}))
	require.Equal(t, [][2]uint64{{0, 2}, {4, 5}, {9, 9}}, merge([]uint64{5, 2, 0, 9, 1, 4, 1}))
	top := ^uint64(0)
	require.Equal(t, [][2]uint64{{0, 0}, {top - 1, top}}, merge([]uint64{top, 0, top - 1}))

	rapid.Check(t, func(t *rapid.T) {
		indexes := rapid.SliceOfN(rapid.Uint64Range(0, 60), 0, 80).Draw(t, "indexes")
		want := map[uint64]bool{}
		for _, i := range indexes {
			want[i] = true
		}
		got := map[uint64]bool{}
		for _, r := range merge(indexes) {
			for i := r[0]; i <= r[1]; i++ {
				require.False(t, got[i], "ranges overlap")
				got[i] = true
			}
		}
		require.Equal(t, want, got)
	})
}

func TestCountOfDeliveriesIsReadFromTheReply(t *testing.T) {
	for reply, want := range map[string]bool{
		"$JS.ACK.HOLDFAST_REQUESTS.recorder.1.2.3.4.5":                   false,
		"$JS.ACK.HOLDFAST_REQUESTS.recorder.2.2.3.4.5":                   true,
		"$JS.ACK.hub.ACCHASH.HOLDFAST_REQUESTS.recorder.1.2.3.4.5":       false,
		"$JS.ACK.hub.ACCHASH.HOLDFAST_REQUESTS.recorder.12.2.3.4.5":      true,
		"$JS.ACK._.ACCHASH.HOLDFAST_REQUESTS.recorder.2.2.3.4.5.randoms": true,
		"": false,
	} {
		require.Equal(t, want, redelivered(reply), reply)
	}
}
