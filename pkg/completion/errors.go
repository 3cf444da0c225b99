package completion

import "errors"

var (
	// ErrQueueFull says that an event was not taken because as many as
	// [Options.MaxQueue] are waiting.
	ErrQueueFull = errors.New("queue full")
	// ErrClosed says that the client was closed before the event was confirmed.
	ErrClosed = errors.New("client closed")
	// ErrEvent says that an event is malformed and was not taken.
	ErrEvent = errors.New("malformed event")
	// ErrRefused says that the acker will not take the request, now or later.
	ErrRefused = errors.New("refused")
)
