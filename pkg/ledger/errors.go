package ledger

import "errors"

// Errors that callers tell apart. Stores wrap them.
var (
	// ErrNotFound: no request, run or quarantine of that id.
	ErrNotFound = errors.New("not found")
	// ErrFenced: the lease was lost; somebody else may hold it now. Nothing was
	// written.
	ErrFenced = errors.New("lease lost")
	// ErrFull: no room for new captures. Facts about requests that are held,
	// deletes and reads still work, from a reserve kept for them.
	ErrFull = errors.New("ledger full")
	// ErrUnavailable: busy, locked or not reachable for the moment. Try again.
	ErrUnavailable = errors.New("ledger unavailable")
	// ErrNewerSchema: written by a newer release. It is left as it is.
	ErrNewerSchema = errors.New("ledger of a newer version")
	// ErrDamaged: the store's files cannot be read. They are left as they are.
	ErrDamaged = errors.New("ledger damaged")
	// ErrInvalidCursor: the cursor was not made by this ledger.
	ErrInvalidCursor = errors.New("invalid cursor")
	// ErrConflict: the state of the run or request does not allow it.
	ErrConflict = errors.New("conflict")
)
