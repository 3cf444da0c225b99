package completion

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// MaxDetailBytes bounds [Event.Detail]. What is longer is cut.
const MaxDetailBytes = 8 << 10

// Outcome is what became of a request.
type Outcome string

const (
	// Processed says that the request needs no more attempts. It is final: no
	// later event takes it back.
	Processed Outcome = "processed"
	// Failed says that the attempt named by the event has failed and that the
	// request may be sent again.
	Failed Outcome = "failed"
)

// Event is the API's word about one request.
type Event struct {
	// ID is the X-Request-UUID that the API received, as 36 characters.
	ID string `json:"id"`
	// Outcome is [Processed] or [Failed].
	Outcome Outcome `json:"outcome"`
	// Attempt is the X-Request-Attempt that the API received, 1 when there was
	// none. 0 stands for 1.
	Attempt int `json:"attempt"`
	// Detail is a short text for people, for instance why it failed. It is kept
	// and shown: put no secrets into it. Bytes that are not UTF-8 are replaced,
	// and what is longer than [MaxDetailBytes] is cut.
	Detail string `json:"detail,omitempty"`
}

// normal returns the event as it is sent, or an error that wraps ErrEvent.
func (e Event) normal() (Event, error) {
	if !isUUID(e.ID) {
		return e, fmt.Errorf("%w: id %.40q is not a UUID of 36 characters", ErrEvent, e.ID)
	}
	if e.Outcome != Processed && e.Outcome != Failed {
		return e, fmt.Errorf("%w: outcome %.40q is neither %q nor %q", ErrEvent, e.Outcome, Processed, Failed)
	}
	if e.Attempt == 0 {
		e.Attempt = 1
	}
	if e.Attempt < 1 || e.Attempt > maxAttempt {
		return e, fmt.Errorf("%w: attempt %d is not a number from 1 to %d", ErrEvent, e.Attempt, maxAttempt)
	}
	e.Detail = cut(strings.ToValidUTF8(e.Detail, "\uFFFD"), MaxDetailBytes)
	return e, nil
}

// maxAttempt is the greatest attempt that the acker takes.
const maxAttempt = 1 << 30

// isUUID reports whether s has the form of a UUID other than the nil UUID,
// which the acker takes for none.
func isUUID(s string) bool {
	if len(s) != 36 || s == "00000000-0000-0000-0000-000000000000" {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f', 'A' <= c && c <= 'F':
		default:
			return false
		}
	}
	return true
}

// cut returns at most limit bytes of s and splits no character.
func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}
