package ingress

import "sync/atomic"

// limiter bounds the bytes of requests in flight. It never waits: what does not
// fit is refused at once, so that a client learns to come later rather than
// hold a connection.
type limiter struct {
	max  int64
	used atomic.Int64
}

// acquire takes n bytes for a request that has held some already, or reports that
// there is no room. A single request larger than the limit passes when nothing
// else is in flight: MAX_BODY_BYTES decides what is too large, not this.
func (l *limiter) acquire(held, n int64) bool {
	now := l.used.Add(n)
	if now <= l.max || now == held+n {
		return true
	}
	l.used.Add(-n)
	return false
}

func (l *limiter) release(n int64) { l.used.Add(-n) }
