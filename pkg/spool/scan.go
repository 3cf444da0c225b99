package spool

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Scan calls f with every record that stands in the segments of a spool
// directory, oldest segment first. It takes no lock and opens files for reading
// only, so it may look into a spool that a process has open, and disturbs
// nothing.
//
// It cannot tell released records from others: which are released is known to
// the owner's memory alone. Of a spool in use it gives at least the records that
// had been written when Scan was called and are not released when it returns;
// segments that are freed meanwhile may be left out, whole or in part. Invalid
// bytes are passed over, as a crash may leave them; a segment whose header is
// invalid is a *DamageError, after all others were read. ErrNewer is returned as
// by Open. Errors of f end the scan and are returned as they are.
func Scan(ctx context.Context, dir string, f func(Record) error) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("scan spool: %w", err)
	}
	type file struct {
		seq uint64
		gen int
	}
	pattern := regexp.MustCompile(`^([0-9a-f]{16})-([0-9]+)\.seg$`)
	newest := map[uint64]int{} // the generation counts salvages; only the last one counts
	for _, entry := range names {
		m := pattern.FindStringSubmatch(entry.Name())
		if m == nil {
			continue
		}
		seq, _ := strconv.ParseUint(m[1], 16, 64) // the pattern has checked both
		gen, _ := strconv.Atoi(m[2])
		newest[seq] = max(newest[seq], gen)
	}
	files := make([]file, 0, len(newest))
	for seq, gen := range newest {
		files = append(files, file{seq, gen})
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Compare(a.seq, b.seq) })
	var damages []error
	var buf []byte
	for _, one := range files {
		path := filepath.Join(dir, segmentName(one.seq, one.gen))
		damage, err := scanSegment(ctx, path, &buf, f)
		if err != nil {
			return err
		}
		if damage != nil {
			damages = append(damages, damage)
		}
	}
	return errors.Join(damages...)
}

// scanSegment gives a segment's records to f. It shares buf from call to call.
func scanSegment(ctx context.Context, path string, buf *[]byte, f func(Record) error) (damage, err error) {
	r, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // freed meanwhile
	}
	if err != nil {
		return nil, fmt.Errorf("scan spool: %w", err)
	}
	defer r.Close()
	h, err := readHeader(osFile{r})
	switch {
	case errors.Is(err, ErrNewer):
		return nil, fmt.Errorf("scan spool segment %s: %w", path, err)
	case err != nil && h.salt == 0:
		if _, gone := os.Stat(path); errors.Is(gone, os.ErrNotExist) {
			return nil, nil // freed, and being written anew, meanwhile
		}
		return &DamageError{File: path, Reason: "its header is invalid"}, nil
	}
	size, err := osFile{r}.Size()
	if err != nil {
		return nil, fmt.Errorf("scan spool: %w", err)
	}
	c := &scanner{file: r, salt: h.salt, off: block, end: min(size, h.size-block), buf: *buf}
	defer func() { *buf = c.buf }()
	for {
		rec, err := c.next()
		switch {
		case errors.Is(err, io.EOF), err == nil && rec.kind == kindSeal:
			return nil, nil
		case err != nil:
			return nil, fmt.Errorf("scan spool segment %s: %w", path, err)
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		}
		if err := f(Record{Position: Position{Start: h.start, Index: rec.index}, Data: rec.data, AppendedAt: time.Unix(0, rec.at)}); err != nil {
			return nil, err
		}
	}
}

// ScanAside calls f with every record that was set aside below a spool
// directory, in no particular order; data is the record as it was. Like [Scan]
// it disturbs nothing.
func ScanAside(ctx context.Context, dir string, f func(a Aside, data []byte) error) error {
	names, err := os.ReadDir(filepath.Join(dir, asideDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("scan records set aside: %w", err)
	}
	for _, entry := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !strings.HasSuffix(entry.Name(), ".record") {
			continue
		}
		path := filepath.Join(dir, asideDir, entry.Name())
		content, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("scan records set aside: %w", err)
		}
		line, data, _ := bytes.Cut(content, []byte("\n"))
		a := Aside{Path: path}
		if err := json.Unmarshal(line, &a); err != nil {
			return fmt.Errorf("scan records set aside: %s: %w", path, err)
		}
		if err := f(a, data); err != nil {
			return err
		}
	}
	return nil
}
