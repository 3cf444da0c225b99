package exampleapi

import "fmt"

// Order is what the API's own record says of the order in which requests were
// replayed.
type Order struct {
	Keys     int // of which requests were replayed
	Arrivals int // of replayed requests with a key, repeats included
	// Broken names the first breaches, at most 20: a request that came after a
	// later one of its key, or while another of its key was worked on.
	Broken []string
}

// Kept reports whether there was any order to keep, and it was kept.
func (o Order) Kept() bool { return o.Keys > 0 && len(o.Broken) == 0 }

// maxBroken bounds [Order.Broken].
const maxBroken = 20

// ReplayOrder judges the arrivals in a file: within each key, ids have to
// ascend, and one request at a time is worked on. A request may come again until
// one after it has come. What live traffic sent is not judged: it is not held
// back by a replay.
func ReplayOrder(path string) (Order, error) {
	var o Order
	last := map[string]string{} // key → id
	broken := func(format string, args ...any) {
		if len(o.Broken) < maxBroken {
			o.Broken = append(o.Broken, fmt.Sprintf(format, args...))
		}
	}
	err := EachArrival(path, func(a Arrival) {
		if a.Replay == "" || a.Key == "" {
			return
		}
		o.Arrivals++
		if a.Beside > 0 {
			broken("arrival %d: %s came while %d others of key %q were worked on", a.Seq, a.ID, a.Beside, a.Key)
		}
		if before := last[a.Key]; a.ID < before {
			broken("arrival %d: %s came after %s of key %q", a.Seq, a.ID, before, a.Key)
			return
		}
		last[a.Key] = a.ID
	})
	o.Keys = len(last)
	return o, err
}
