package wire

import (
	"errors"
	"fmt"
)

// SyntaxError says why a message is not taken.
type SyntaxError struct {
	// Status answers a request of this kind.
	Status int
	// Reason names what is wrong, without repeating what was sent.
	Reason string
}

// Error gives the reason.
func (e *SyntaxError) Error() string { return e.Reason }

// ErrHeadTooLarge is the head of an answer above its limit.
var ErrHeadTooLarge = errors.New("the head is too large")

// bad is the error of a message that is not valid HTTP.
func bad(format string, args ...any) error {
	return &SyntaxError{Status: 400, Reason: fmt.Sprintf(format, args...)}
}
