package spool

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestAClockThatWasSetBack opens a spool whose records were written while the
// system's clock was an hour ahead. A record from the future would have no age:
// a replay would not wait for it, and nobody would publish it again.
func TestAClockThatWasSetBack(t *testing.T) {
	o := Options{Dir: t.TempDir(), MaxBytes: 16 << 20, MaxRecordBytes: 1 << 10, SegmentBytes: 64 << 10}
	s, err := Open(o)
	require.NoError(t, err)
	s.ahead = time.Hour
	appendOne(t, s)
	require.NoError(t, s.Close())

	s, err = Open(o)
	require.NoError(t, err)
	oldest := s.Stats().OldestUnreleased
	require.True(t, oldest.After(time.Now().Add(30*time.Minute)), "the test needs a record from the future")
	require.True(t, oldest.Before(s.Now()))
	age := s.Now().Sub(oldest)
	appendOne(t, s)
	require.Greater(t, s.Now().Sub(oldest), age, "it grows older")
	r := s.UnreleasedBefore(s.Now())
	for index := range 2 {
		rec, err := r.Next(context.Background())
		require.NoError(t, err, "record %d", index)
		require.False(t, rec.AppendedAt.Before(oldest))
	}
	require.NoError(t, s.Close())
}

func appendOne(t *testing.T, s *Spool) {
	t.Helper()
	res, err := s.Reserve(1, 1)
	require.NoError(t, err)
	defer res.Release()
	_, err = res.AppendWritten([]byte("x"))
	require.NoError(t, err)
}
