package capture

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// SpoolRef names one spool record: the value of [HeaderSpool].
type SpoolRef struct {
	Ingress string
	Start   string // id of the process start that wrote the record, hex
	Index   uint64
}

// String is "<ingress>/<start>/<index>".
func (r SpoolRef) String() string {
	return r.Ingress + "/" + r.Start + "/" + strconv.FormatUint(r.Index, 10)
}

// AppendSpoolRefs appends the header's value for a message that was published
// from several records of one process start: "<ingress>/<start>/<index>,<index>…".
func AppendSpoolRefs(dst []byte, ingress, start string, indexes ...uint64) []byte {
	dst = append(dst, ingress...)
	dst = append(dst, '/')
	dst = append(dst, start...)
	for i, index := range indexes {
		if i == 0 {
			dst = append(dst, '/')
		} else {
			dst = append(dst, ',')
		}
		dst = strconv.AppendUint(dst, index, 10)
	}
	return dst
}

// maxRefs bounds the records that one message can name.
const maxRefs = 4096

// ParseSpoolRefs reads the header of a message: the records that it was
// published from, in their order. A message without the header, or with a
// malformed one, names none: then nobody waits for a word about it.
func ParseSpoolRefs(h Header) []SpoolRef {
	ingress, rest, ok1 := strings.Cut(first(h, HeaderSpool), "/")
	start, list, ok2 := strings.Cut(rest, "/")
	if !ok1 || !ok2 || !ValidIngress(ingress) || start == "" {
		return nil
	}
	refs := make([]SpoolRef, 0, strings.Count(list, ",")+1)
	for index := range strings.SplitSeq(list, ",") {
		n, err := strconv.ParseUint(index, 10, 64)
		if err != nil || len(refs) == maxRefs {
			return nil
		}
		refs = append(refs, SpoolRef{Ingress: ingress, Start: start, Index: n})
	}
	return refs
}

// ParseSpoolRef is [ParseSpoolRefs] for a message that names one record. ok is
// false when it does not.
func ParseSpoolRef(h Header) (ref SpoolRef, ok bool) {
	refs := ParseSpoolRefs(h)
	if len(refs) != 1 {
		return SpoolRef{}, false
	}
	return refs[0], true
}

// Word releases spool records: what they hold is durable elsewhere. It travels
// on [CommittedSubject]. It may be lost or repeated; both do no harm.
type Word struct {
	Start    string      `json:"start"`
	Released [][2]uint64 `json:"released"` // ranges of indexes, both ends included
}

// Encode gives the word as JSON.
func (w Word) Encode() []byte {
	b := append([]byte(`{"start":`), strconv.Quote(w.Start)...)
	b = append(b, `,"released":[`...)
	for i, r := range w.Released {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, '[')
		b = strconv.AppendUint(b, r[0], 10)
		b = append(b, ',')
		b = strconv.AppendUint(b, r[1], 10)
		b = append(b, ']')
	}
	return append(b, ']', '}')
}

// DecodeWord reads a word. Errors wrap [ErrMalformed].
func DecodeWord(data []byte) (Word, error) {
	var w Word
	if err := json.Unmarshal(data, &w); err != nil {
		return Word{}, fmt.Errorf("decode word: %w: %w", ErrMalformed, err)
	}
	for _, r := range w.Released {
		if w.Start == "" || r[0] > r[1] {
			return Word{}, fmt.Errorf("decode word: %w", ErrMalformed)
		}
	}
	return w, nil
}

// Heartbeat is what an ingress says of its spool, on [HeartbeatSubject].
type Heartbeat struct {
	Ingress    string    `json:"ingress"`
	Start      string    `json:"start"`
	Now        time.Time `json:"now"` // the ingress's clock
	Unreleased int       `json:"unreleased"`
	// OldestUnreleased is by the ingress's clock, zero when there is none. Only
	// its distance from Now means anything elsewhere.
	OldestUnreleased time.Time `json:"oldest_unreleased,omitzero"`
	// Age is how long ago it was sent when it is handed to the ledger, as its
	// receiver knows; it does not travel.
	Age time.Duration `json:"-"`
	// Captured is how many captures of this start were durable in its spool when
	// their answers were let go, at Now. It only grows. 0 from an ingress that
	// does not count.
	Captured int64 `json:"captured,omitempty"`
	// Stopped is set on the last heartbeat of an ingress that stops with an
	// empty spool: nobody has to wait for it any more.
	Stopped bool `json:"stopped,omitempty"`
}

// Encode gives the heartbeat as JSON.
func (h Heartbeat) Encode() ([]byte, error) {
	b, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encode heartbeat: %w", err)
	}
	return b, nil
}

// DecodeHeartbeat reads a heartbeat. Errors wrap [ErrMalformed].
func DecodeHeartbeat(data []byte) (Heartbeat, error) {
	var h Heartbeat
	if err := json.Unmarshal(data, &h); err != nil {
		return Heartbeat{}, fmt.Errorf("decode heartbeat: %w: %w", ErrMalformed, err)
	}
	if !ValidIngress(h.Ingress) || h.Now.IsZero() || h.Captured < 0 {
		return Heartbeat{}, fmt.Errorf("decode heartbeat: %w: ingress %q, now %s", ErrMalformed, h.Ingress, h.Now)
	}
	return h, nil
}

// UnreleasedFor is how long the oldest unreleased record has waited, 0 when
// there is none.
func (h Heartbeat) UnreleasedFor() time.Duration {
	if h.Unreleased == 0 || h.OldestUnreleased.IsZero() {
		return 0
	}
	return max(h.Now.Sub(h.OldestUnreleased), 0)
}
