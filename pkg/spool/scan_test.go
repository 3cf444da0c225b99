package spool_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/spool"
)

// scan gives what Scan finds.
func scan(t *testing.T, dir string) (data []string, at []spool.Position, err error) {
	t.Helper()
	err = spool.Scan(t.Context(), dir, func(r spool.Record) error {
		data, at = append(data, string(r.Data)), append(at, r.Position)
		require.False(t, r.AppendedAt.IsZero())
		return nil
	})
	return data, at, err
}

func TestScanReadsASpoolThatIsInUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	var want []string
	var at []spool.Position
	for i := range 300 { // several segments
		want = append(want, fmt.Sprintf("%d %s", i, strings.Repeat("x", i)))
		at = append(at, put(t, s, want[i]))
	}
	s.Release(s.Start(), spool.Range{First: 290, Last: 295})
	data, positions, err := scan(t, dir)
	require.NoError(t, err)
	require.Equal(t, want, data, "released records of a segment that is not free are there, too")
	require.Equal(t, at, positions)

	stop := errors.New("stop")
	require.Equal(t, stop, spool.Scan(t.Context(), dir, func(spool.Record) error { return stop }))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, spool.Scan(cancelled, dir, func(spool.Record) error { return nil }), context.Canceled)

	// The owner has noticed nothing.
	put(t, s, "live")
	require.Equal(t, 295, s.Stats().Unreleased)
	require.NoError(t, s.Close())
	data, _, err = scan(t, dir)
	require.NoError(t, err)
	require.Equal(t, append(want, "live"), data)
	require.Equal(t, data, readAll(t, open(t, small(dir))))
}

func TestScanNeverGivesRecordsOfAFormerUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	for round := range 20 { // segments are recycled
		for i := range 100 {
			put(t, s, fmt.Sprintf("%d %d %s", round, i, strings.Repeat("x", 100)))
		}
		data, positions, err := scan(t, dir)
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(data), 100)
		require.Equal(t, uint64(round*100+100), positions[len(positions)-1].Index)
		for i := 1; i < len(positions); i++ {
			require.Equal(t, positions[i-1].Index+1, positions[i].Index)
		}
		s.Release(s.Start(), spool.Range{First: 1, Last: positions[len(positions)-1].Index})
	}
}

func TestScanNamesASegmentThatItCannotRead(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	for i := range 300 {
		put(t, s, fmt.Sprintf("%d %s", i, strings.Repeat("x", i)))
	}
	require.NoError(t, s.Close())
	whole, _, err := scan(t, dir)
	require.NoError(t, err)
	require.Len(t, whole, 300)
	files, err := filepath.Glob(filepath.Join(dir, "*.seg"))
	require.NoError(t, err)
	info, err := os.Stat(files[0])
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(files[0], make([]byte, info.Size()), 0o600))
	rest, _, err := scan(t, dir)
	var damage *spool.DamageError
	require.ErrorAs(t, err, &damage)
	require.Equal(t, files[0], damage.File)
	require.Less(t, len(rest), 300)
	require.Equal(t, whole[299], rest[len(rest)-1], "the others are read")
	_, _, err = scan(t, filepath.Join(dir, "nowhere"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestScanAside(t *testing.T) {
	dir := t.TempDir()
	none := func(spool.Aside, []byte) error { return errors.New("there is none") }
	require.NoError(t, spool.ScanAside(t.Context(), dir, none))
	s := open(t, small(dir))
	at := put(t, s, "line\nline")
	require.NoError(t, s.SetAside(at, "too big"))
	found := 0
	require.NoError(t, spool.ScanAside(t.Context(), dir, func(a spool.Aside, data []byte) error {
		found++
		require.Equal(t, "line\nline", string(data))
		require.Equal(t, "too big", a.Reason)
		require.Equal(t, at.Start.String(), a.Start)
		require.Equal(t, at.Index, a.Index)
		return nil
	}))
	require.Equal(t, 1, found)
}
