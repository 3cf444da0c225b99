package spool_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/stretchr/testify/require"
)

// snapshot copies the files of a running spool: what kill -9 leaves behind.
func snapshot(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		if !e.IsDir() {
			content, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if errors.Is(err, os.ErrNotExist) {
				continue // a spare segment has just got its name
			}
			require.NoError(t, err)
			files[e.Name()] = content
		}
	}
	return files
}

func restore(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), content, 0o600))
	}
	return dir
}

// memDir puts files into a file system in memory.
func memDir(files map[string][]byte) *memFS {
	fs := newMemFS(1)
	for name, content := range files {
		path := filepath.Join("/spool", name)
		f := &inode{path: path, data: slices.Clone(content), disk: slices.Clone(content), size: len(content), dirty: map[int]bool{}}
		fs.live[path], fs.durable[path] = f, f
	}
	return fs
}

// holding returns the name of the file that contains text, and where.
func holding(t *testing.T, files map[string][]byte, text string) (string, int) {
	t.Helper()
	for name, content := range files {
		if i := bytes.Index(content, []byte(text)); i >= 0 && strings.HasSuffix(name, ".seg") {
			return name, i
		}
	}
	require.Fail(t, "not in any segment", text)
	return "", 0
}

func TestTornAtEveryByteOfTheLastRecord(t *testing.T) {
	dir := t.TempDir()
	s := open(t, small(dir))
	put(t, s, "first")
	put(t, s, "second")
	const last = "the last record, thirty-six bytes long"
	put(t, s, last)
	files := snapshot(t, dir)
	name, at := holding(t, files, last)
	end := at + (len(last)+7)&^7
	whole := 0
	check := func(what string, content []byte) {
		broken := maps.Clone(files)
		broken[name] = content
		o := small("/spool")
		o.FS = memDir(broken)
		again, err := spool.Open(o)
		require.NoError(t, err, what)
		got := readAll(t, again)
		require.GreaterOrEqual(t, len(got), 2, what)
		require.Equal(t, []string{"first", "second"}, got[:2], what)
		if len(got) > 2 {
			require.Equal(t, []string{last}, got[2:], what)
			whole++
		}
		// It goes on from here, also over the torn bytes.
		put(t, again, "next")
		require.Equal(t, append(got, "next"), readAll(t, again))
		require.NoError(t, again.Close())
	}
	for i := at - 48; i <= end; i++ {
		cut := bytes.Clone(files[name][:i])
		check(fmt.Sprintf("cut at %d", i-at), cut)
		zeroed := append(cut, make([]byte, len(files[name])-i)...)
		check(fmt.Sprintf("zeros from %d", i-at), zeroed)
		if i < at+len(last) {
			before := whole
			flipped := bytes.Clone(files[name])
			flipped[i] ^= 0x40
			check(fmt.Sprintf("bit flipped at %d", i-at), flipped)
			require.Equal(t, before, whole, "a flipped bit at %d does not pass", i-at)
		}
	}
	require.NotZero(t, whole)
}

func TestValidRecordsBehindAnUnsyncedHoleAreKept(t *testing.T) {
	fs := newMemFS(1)
	o := small("/spool")
	o.FS = fs
	s := open(t, o)
	put(t, s, "synced")
	// With fsync held back nothing of this is durable.
	gate := make(chan struct{})
	fs.mu.Lock()
	fs.fault = func(op, _ string) error {
		if op == "datasync" {
			<-gate
		}
		return nil
	}
	fs.mu.Unlock()
	for _, text := range []string{"one", "two is lost", "three"} {
		_, err := appendOne(s, []byte(text), false)
		require.NoError(t, err)
	}
	fs.mu.Lock()
	for _, f := range fs.live {
		if i := bytes.Index(f.data, []byte("two is lost")); i >= 0 {
			f.data[i]++
		}
	}
	fs.mu.Unlock()
	o.FS = fs.crash(true)
	close(gate)
	again := open(t, o)
	require.Equal(t, []string{"synced", "one", "three"}, readAll(t, again))
	require.Equal(t, 3, again.Stats().Unreleased)
	require.Equal(t, 3, again.Release(s.Start(), spool.Range{First: 1, Last: 4}))
}

func sums(files map[string][]byte) map[string]uint32 {
	m := map[string]uint32{}
	for name, content := range files {
		m[name] = crc32.ChecksumIEEE(content)
	}
	return m
}

// several returns the files of a spool with several segments, and the texts in it.
func several(t *testing.T, closed bool) (files map[string][]byte, texts []string) {
	dir := t.TempDir()
	s := open(t, small(dir))
	for i := range 40 {
		texts = append(texts, fmt.Sprintf("record %02d. %s", i, strings.Repeat("z", 3500)))
		put(t, s, texts[i])
	}
	if closed {
		require.NoError(t, s.Close())
	}
	return snapshot(t, dir), texts
}

func TestDamageIsRefusedAndSalvaged(t *testing.T) {
	files, texts := several(t, false)
	closedFiles, _ := several(t, true)
	cases := map[string]struct {
		files  map[string][]byte
		victim string // the file that has it is damaged
		damage func(content []byte, at int) []byte
		lost   int // records; -1 is all of the file
	}{
		"a byte of a record": {files, "record 05.", func(b []byte, at int) []byte { b[at+100]++; return b }, 1},
		"a record's header":  {files, "record 05.", func(b []byte, at int) []byte { b[at-40]++; return b }, 1},
		"a page":             {files, "record 05.", func(b []byte, at int) []byte { clear(b[at+3000:][:1000]); return b }, 2},
		"a cut segment":      {files, "record 05.", func(b []byte, at int) []byte { return b[:at+10] }, -2},
		"the first header":   {files, "record 05.", func(b []byte, _ int) []byte { clear(b[:512]); return b }, 0},
		"a flipped version":  {files, "record 05.", func(b []byte, _ int) []byte { b[8] = 77; return b }, 0},
		"both headers": {files, "record 05.", func(b []byte, _ int) []byte {
			clear(b[:4096])
			clear(b[len(b)-4096:])
			return b
		}, -1},
		"an empty file":                        {files, "record 05.", func([]byte, int) []byte { return nil }, -1},
		"the segment in use, below a sync":     {files, "record 36.", func(b []byte, at int) []byte { b[at]++; return b }, 1},
		"the last record after a clean close":  {closedFiles, "record 39.", func(b []byte, at int) []byte { b[at]++; return b }, 1},
		"the first record after a clean close": {closedFiles, "record 00.", func(b []byte, at int) []byte { b[at]++; return b }, 1},
	}
	for title, c := range cases {
		t.Run(title, func(t *testing.T) {
			broken := maps.Clone(c.files)
			name, at := holding(t, broken, c.victim)
			content := c.damage(bytes.Clone(broken[name]), at)
			broken[name] = content
			dir := restore(t, broken)

			_, err := spool.Open(small(dir))
			var damage *spool.DamageError
			require.ErrorAs(t, err, &damage)
			require.Equal(t, filepath.Join(dir, name), damage.File)
			require.ErrorContains(t, err, "HOLDFAST_SPOOL_SALVAGE=true")
			require.Equal(t, sums(broken), sums(snapshot(t, dir)), "nothing is touched")

			o := small(dir)
			o.Salvage = true
			s := open(t, o)
			got := readAll(t, s)
			kept := 0
			for _, text := range texts {
				if slices.Contains(got, text) {
					kept++
				} else {
					require.Contains(t, string(c.files[name]), text, "lost from another file")
				}
			}
			require.Len(t, got, kept, "nothing is invented")
			if c.lost >= 0 {
				require.Equal(t, len(texts)-c.lost, kept)
			} else {
				require.Less(t, kept, len(texts))
				require.Greater(t, kept, 10)
			}
			require.True(t, bytes.Equal(content, snapshot(t, dir)[name+".damaged"]), "the damaged file is kept")
			put(t, s, "goes on")
			require.NoError(t, s.Close())

			// Once is enough.
			s = open(t, small(dir))
			require.Equal(t, append(got, "goes on"), readAll(t, s))
			require.NoError(t, s.Close())
		})
	}
}

func TestSalvageSurvivesAnyCrash(t *testing.T) {
	files, texts := several(t, false)
	name, at := holding(t, files, "record 05.")
	files[name][at+9]++
	want := slices.Delete(slices.Clone(texts), 5, 6)
	for n := range 40 {
		fs := memDir(files)
		fs.cutAfter(n)
		o := small("/spool")
		o.FS, o.Salvage = fs, true
		if s, err := spool.Open(o); err == nil {
			_ = s.Close() // without power it cannot do it well
		}
		fs = fs.crash(n%2 == 0)
		o.FS = fs
		s, err := spool.Open(o)
		require.NoError(t, err)
		require.Equal(t, want, readAll(t, s), "after %d operations", n)
		require.Equal(t, 1, fs.count(".damaged"))
		require.NoError(t, s.Close())
	}
}

func TestNewerVersionIsRefused(t *testing.T) {
	files, _ := several(t, true)
	for name, content := range files {
		if strings.HasSuffix(name, ".seg") {
			binary.LittleEndian.PutUint32(content[8:], 2)
			binary.LittleEndian.PutUint32(content[len(content)-4096+8:], 2)
		}
	}
	dir := restore(t, files)
	for _, salvage := range []bool{false, true} {
		o := small(dir)
		o.Salvage = salvage
		_, err := spool.Open(o)
		require.ErrorIs(t, err, spool.ErrNewer)
		require.Equal(t, sums(files), sums(snapshot(t, dir)))
	}
}

func TestForeignBytesNeverPassForRecords(t *testing.T) {
	// A client sends what it has learnt of another segment's bytes.
	dir := t.TempDir()
	s := open(t, small(dir))
	put(t, s, "original")
	files := snapshot(t, dir)
	name, at := holding(t, files, "original")
	forged := string(files[name][at-48 : at+8])
	require.NoError(t, s.Close())

	dir = t.TempDir()
	s = open(t, small(dir))
	put(t, s, "a")
	put(t, s, strings.Repeat(forged, 50))
	files = snapshot(t, dir)
	name, at = holding(t, files, forged)
	files[name][at-48]++ // the header of the record that carries them
	s = open(t, small(restore(t, files)))
	require.Equal(t, []string{"a"}, readAll(t, s))
}

func TestAllocationByZerosAndReadErrors(t *testing.T) {
	fs := memDir(nil)
	fault := errors.New("bad sector")
	fs.fault = func(op, _ string) error {
		if op == "allocate" {
			return fault
		}
		return nil
	}
	o := small("/spool")
	o.FS = fs
	_, err := spool.Open(o)
	require.ErrorIs(t, err, spool.ErrBroken)
	require.ErrorIs(t, err, fault)
	require.Zero(t, fs.count(".tmp"))
	fs.fault = nil
	require.NoError(t, open(t, o).Close(), "the lock was given back")
}
