package replayer

import "time"

// speed has requests sent as far apart as they were received, divided by a
// factor. It is for one goroutine.
type speed struct {
	factor float64
	maxGap time.Duration
	last   time.Time // of receipt, the latest that had its turn
	due    time.Time // when that had its turn
}

// maxLag is how far a run may fall behind and catch up. One that was held up for
// longer goes on at its pace from where it is: what was missed does not come in
// one burst.
const maxLag = time.Second

// at gives the turn of a request. One that was received before another that had
// its turn, because it is sent again for instance, goes at once.
func (s *speed) at(now, received time.Time) time.Time {
	if s.last.IsZero() {
		return now
	}
	gap := min(max(received.Sub(s.last), 0), s.maxGap)
	due := s.due.Add(time.Duration(float64(gap) / s.factor))
	if now.Sub(due) > maxLag {
		return now
	}
	return due
}

// next takes a turn, and says how long it is until then.
func (s *speed) next(now, received time.Time) time.Duration {
	s.due = s.at(now, received)
	if received.After(s.last) {
		s.last = received
	}
	return s.due.Sub(now)
}

// allows takes a turn if it has come.
func (s *speed) allows(now, received time.Time) bool {
	if s.at(now, received).After(now) {
		return false
	}
	s.next(now, received)
	return true
}
