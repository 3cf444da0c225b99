package embednats

import "errors"

// Errors that callers tell apart.
var (
	// ErrLocked: another process has the directory.
	ErrLocked = errors.New("directory is in use by another process")
	// ErrNewerVersion: the directory was written by a newer release.
	ErrNewerVersion = errors.New("directory of a newer version")
	// ErrDamaged: the directory holds something that cannot be read. It is left
	// as it is.
	ErrDamaged = errors.New("directory is damaged")
	// ErrUnhealthy: the server runs but does not store.
	ErrUnhealthy = errors.New("JetStream does not store")
	// ErrStopped: the server was shut down.
	ErrStopped = errors.New("server is shut down")
)
