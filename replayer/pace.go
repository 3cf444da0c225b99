package replayer

import (
	"math"
	"time"
)

// window is how much may be in flight to one API. It begins with one, grows by
// one with each answer (so that it doubles with each round of them) until the API
// first shows that it is too much, and from then on by one a round. An API that
// refuses for load, or does not answer in time, halves it, at most once for what
// was in flight together. It does not grow while answers take much longer than
// they did: what is slow is loaded, by us or by live traffic, which goes first.
//
// It is for one goroutine.
type window struct {
	most  int     // never more
	limit float64 // at least 1
	slow  bool    // it was never cut: it grows fast
	used  int     // in flight

	reached int // the most that was in flight
	cuts    int

	begun int64 // attempts so far
	cutAt int64 // as many of them had begun when it was cut

	smoothed, best time.Duration // of the time that answers take
	answers        int
}

// Numbers of a window.
const (
	// warmUp is how many answers are needed before their time means anything.
	warmUp = 8
	// latencyNoise is what an answer may take longer without being slow: what
	// schedulers and networks add to very quick ones.
	latencyNoise = 5 * time.Millisecond
	// forget is how fast the best time is forgotten, as a share of the difference
	// that each answer takes away: an API whose requests have become heavier is
	// held for some hundred answers, not for ever.
	forget = 512
)

func newWindow(most int) window { return window{most: most, limit: 1, slow: true} }

// room is how many attempts may begin.
func (w *window) room() int { return min(int(w.limit), w.most) - w.used }

// begin takes a place and gives the attempt's number.
func (w *window) begin() int64 {
	w.used++
	w.reached = max(w.reached, w.used)
	w.begun++
	return w.begun
}

// end gives the place back.
func (w *window) end() { w.used-- }

// answered notes a whole answer that shows no overload, and how long it took.
func (w *window) answered(took time.Duration) {
	w.answers++
	if w.answers == 1 {
		w.smoothed = took
	}
	w.smoothed += (took - w.smoothed) / 8
	switch {
	case w.answers <= warmUp || w.smoothed < w.best:
		w.best = w.smoothed
	default:
		w.best += (w.smoothed - w.best) / forget
	}
	if w.smoothed > max(2*w.best, w.best+latencyNoise) {
		return
	}
	if w.slow {
		w.limit++
	} else {
		w.limit += 1 / w.limit
	}
	w.limit = math.Min(w.limit, float64(w.most))
}

// overloaded notes that the attempt with this number met an API that has too
// much to do.
func (w *window) overloaded(number int64) {
	if number <= w.cutAt {
		return
	}
	w.cutAt, w.slow = w.begun, false
	w.limit = math.Max(1, w.limit/2)
	w.cuts++
}
