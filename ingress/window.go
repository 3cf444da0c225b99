package ingress

import (
	"bytes"
	"context"
	"encoding/json"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/holdfast-io/holdfast/pkg/spool"
)

// inflight names one published message: its number, and the subject on which
// its acknowledgement comes.
type inflight struct {
	number uint64
	reply  string
}

// window is what was published and not yet acknowledged, in order. Numbers
// count on for ever; those from first to next-1 are in the window.
type window struct {
	inbox   string
	changed chan struct{} // something was settled or failed; room for one
	ackWait time.Duration
	m       *metrics

	mu      sync.Mutex
	entries [windowRecords]entry // by number modulo its length
	first   uint64
	next    uint64
	bytes   int
	failed  bool
	back    spool.Position // where to go back to, once failed
	refused []refused
	moved   bool // the oldest was acknowledged since the last failure

	// done holds what was acknowledged behind the record that made the publisher
	// go back: a stream that has room must not get it again while another is full.
	done map[spool.Position]struct{}

	marks [2]mark      // by kind
	words [2]time.Time // when the last word came
}

// mark is a record that was released, and when that became known. All that
// were published before it should be released soon.
type mark struct {
	position spool.Position
	at       time.Time
}

// added is what became of a record that was to enter the window.
type added int

const (
	entered added = iota
	known         // it is acknowledged already, and not to be published
	failed        // the publisher must go back first, and read it again
)

// entry is one published message.
type entry struct {
	start   spool.StartID
	indexes []uint64 // of the records that it holds; the slice is used again
	// resume is where to read on from to publish again all that was read since
	// and may not have been published: the message's first record, or an outcome
	// that was read before it and waited for others.
	resume  spool.Position
	bytes   int
	at      time.Time
	settled bool // acknowledged, or set aside
}

// refused is a message that the broker will never take.
type refused struct {
	number    uint64
	positions []spool.Position
	reason    string
}

func (e *entry) positions() []spool.Position {
	positions := make([]spool.Position, len(e.indexes))
	for i, index := range e.indexes {
		positions[i] = spool.Position{Start: e.start, Index: index}
	}
	return positions
}

// add waits for room and takes the next number, for a message of so many bytes
// that holds records of one start. resume is that of the entry.
func (w *window) add(ctx context.Context, resume spool.Position, bytes int, start spool.StartID, indexes ...uint64) (inflight, added, error) {
	for {
		w.mu.Lock()
		switch {
		case w.failed:
			w.mu.Unlock()
			return inflight{}, failed, nil
		case w.next-w.first < windowRecords && (w.bytes+bytes <= windowBytes || w.next == w.first):
			n := w.next
			w.next++
			e := &w.entries[n%windowRecords]
			*e = entry{start: start, indexes: append(e.indexes[:0], indexes...), resume: resume, at: time.Now()}
			if w.wasAcknowledged(e) {
				e.settled = true
				w.shrink()
				w.mu.Unlock()
				return inflight{}, known, nil
			}
			e.bytes = bytes
			w.bytes += bytes
			w.mu.Unlock()
			return inflight{number: n, reply: w.inbox + "." + strconv.FormatUint(n, 36)}, entered, nil
		}
		late := w.ackWait - time.Since(w.entries[w.first%windowRecords].at)
		if late <= 0 {
			w.goBack()
			w.mu.Unlock()
			return inflight{}, failed, nil
		}
		w.mu.Unlock()
		timer := time.NewTimer(late)
		select {
		case <-w.changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return inflight{}, failed, ctx.Err()
		}
		timer.Stop()
	}
}

// wasAcknowledged reports whether all records of the entry are known to be in
// the stream, and forgets that. mu is held.
func (w *window) wasAcknowledged(e *entry) bool {
	if len(w.done) == 0 {
		return false
	}
	all := true
	for _, p := range e.positions() {
		if _, ok := w.done[p]; !ok {
			all = false
		}
		delete(w.done, p)
	}
	return all
}

// wasStored reports whether a record is known to be in the stream. Other than
// wasAcknowledged it does not forget that: outcomes are grouped anew each time.
func (w *window) wasStored(at spool.Position) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, ok := w.done[at]
	return ok
}

// goBack notes where the publisher must go back to. mu is held, and the window
// is not empty. The place is kept even if all of it is acknowledged meanwhile:
// what was read behind it may not have been published.
func (w *window) goBack() {
	if !w.failed {
		w.failed, w.back = true, w.entries[w.first%windowRecords].resume
	}
	w.signal()
}

// acknowledge takes the server's word about one record.
func (w *window) acknowledge(m *nats.Msg) {
	n, err := strconv.ParseUint(m.Subject[len(w.inbox)+1:], 36, 64)
	if err != nil {
		return
	}
	if m.Header == nil && !bytes.Contains(m.Data, []byte(`"error"`)) {
		w.m.published.Add(float64(w.settle(n)))
		return
	}
	var answer struct {
		Error *struct {
			Code        int    `json:"code"`
			ErrCode     int    `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
	}
	if json.Unmarshal(m.Data, &answer) != nil || answer.Error == nil || !refusedForGood(answer.Error.ErrCode) {
		w.m.publishError.WithLabelValues("retry").Inc()
		w.fail(n) // no responders, no room, too many at once: it may pass
		return
	}
	w.refuse(n, answer.Error.Description)
}

// refusedForGood lists the errors that no repetition mends (nats-server,
// server/errors.json).
func refusedForGood(code int) bool {
	switch code {
	case 10054, // message size exceeds maximum allowed
		10097: // header size exceeds maximum allowed of 64k
		return true
	}
	return false
}

// settle takes a message off the window, and says how many records it held.
func (w *window) settle(n uint64) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n < w.first || n >= w.next {
		return 0
	}
	e := &w.entries[n%windowRecords]
	e.settled = true
	w.moved = w.moved || n == w.first
	w.shrink()
	w.signal()
	return len(e.indexes)
}

// shrink moves the window behind what is settled at its begin. mu is held.
func (w *window) shrink() {
	for w.first < w.next && w.entries[w.first%windowRecords].settled {
		w.bytes -= w.entries[w.first%windowRecords].bytes
		w.first++
	}
}

func (w *window) signal() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// fail makes the publisher go back to the oldest record of the window.
func (w *window) fail(n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n >= w.first && n < w.next {
		w.goBack()
	}
}

// failAll is fail for whatever is in the window.
func (w *window) failAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next > w.first {
		w.goBack()
	}
}

// takeProgress reports whether the oldest record was acknowledged since the
// last call.
func (w *window) takeProgress() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	moved := w.moved
	w.moved = false
	return moved
}

func (w *window) refuse(n uint64, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n >= w.first && n < w.next {
		w.refused = append(w.refused, refused{n, w.entries[n%windowRecords].positions(), reason})
		w.signal()
	}
}

func (w *window) takeRefused() []refused {
	w.mu.Lock()
	defer w.mu.Unlock()
	taken := w.refused
	w.refused = nil
	return taken
}

// mustGoBack reports whether something failed, which a late acknowledgement of
// the oldest record is too.
func (w *window) mustGoBack() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next > w.first && time.Since(w.entries[w.first%windowRecords].at) > w.ackWait {
		w.goBack()
	}
	return w.failed
}

// restart empties the window after a failure, and gives the record to go on
// with.
func (w *window) restart() spool.Position {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.done) > 8*windowRecords {
		clear(w.done) // of released records, which nobody reads again
	}
	for n := w.first; n < w.next; n++ {
		if e := &w.entries[n%windowRecords]; e.settled {
			for _, p := range e.positions() {
				w.done[p] = struct{}{}
			}
		}
	}
	w.first, w.bytes, w.failed, w.refused = w.next, 0, false, nil
	return w.back
}

// pending is how many messages wait for an acknowledgement.
func (w *window) pending() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return float64(w.next - w.first)
}

// heard notes that a word has released a record of this start.
func (w *window) heard(at spool.Position, completion bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k, now := kind(completion), time.Now()
	w.words[k] = now
	if w.marks[k].at.IsZero() {
		w.marks[k] = mark{at, now}
	}
}

// evidence gives the mark of a kind, zero where there is none, and when the last
// word came for it.
func (w *window) evidence(kind int) (mark, time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.marks[kind], w.words[kind]
}

// forget lets the next word make the mark.
func (w *window) forget(kind int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.marks[kind] = mark{}
}
