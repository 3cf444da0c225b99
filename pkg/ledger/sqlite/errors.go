package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"

	"modernc.org/sqlite"
	lib "modernc.org/sqlite/lib"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// dataError is about one item's data: no retry makes it better, and the others
// of its batch are not at fault.
type dataError struct{ reason error }

func (e *dataError) Error() string { return e.reason.Error() }
func (e *dataError) Unwrap() error { return e.reason }

func refuse(format string, args ...any) error {
	return &dataError{reason: fmt.Errorf(format, args...)}
}

// isData reports whether err is about the data of one item: ours, or a
// constraint or size limit of SQLite's.
func isData(err error) bool {
	var ours *dataError
	if errors.As(err, &ours) {
		return true
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code() & 0xff {
	case lib.SQLITE_CONSTRAINT, lib.SQLITE_TOOBIG, lib.SQLITE_MISMATCH:
		return true
	}
	return false
}

// classify wraps err so that callers can tell what kind it is.
func classify(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, sql.ErrConnDone), errors.Is(err, errClosed):
		return fmt.Errorf("%w: %w", ledger.ErrUnavailable, err)
	case errors.Is(err, fs.ErrPermission):
		return err
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code() & 0xff {
	case lib.SQLITE_BUSY, lib.SQLITE_LOCKED, lib.SQLITE_PROTOCOL, lib.SQLITE_IOERR, lib.SQLITE_CANTOPEN, lib.SQLITE_NOMEM, lib.SQLITE_INTERRUPT:
		return fmt.Errorf("%w: %w", ledger.ErrUnavailable, err)
	case lib.SQLITE_FULL:
		return fmt.Errorf("%w: %w", ledger.ErrFull, err)
	case lib.SQLITE_CORRUPT, lib.SQLITE_NOTADB:
		return fmt.Errorf("%w: %w", ledger.ErrDamaged, err)
	}
	return err
}

func isBusy(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && (e.Code()&0xff == lib.SQLITE_BUSY || e.Code()&0xff == lib.SQLITE_LOCKED)
}

var errClosed = errors.New("ledger is closed")
