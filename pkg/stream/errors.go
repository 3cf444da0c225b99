package stream

import "errors"

// Errors that callers tell apart.
var (
	// ErrMissing: the stream or its consumer does not exist. "recorder
	// provision" makes them.
	ErrMissing = errors.New("stream or consumer is missing")
	// ErrDiffers: a stream or a consumer exists and is not made as it must be.
	ErrDiffers = errors.New("stream or consumer is not made as it must be")
	// ErrDisconnected: there is no connection to NATS at the moment.
	ErrDisconnected = errors.New("not connected to NATS")
	// ErrNotConsuming: the loop has no working pull at the moment.
	ErrNotConsuming = errors.New("not consuming")
)
