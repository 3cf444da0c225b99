package stream

import (
	"slices"

	"github.com/nats-io/nats.go"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// maxRanges bounds one word: 1000 ranges of two indexes of at most 20 digits are
// 43 KB, far below any max_payload. A batch that is consecutive at its ingress,
// as nearly all are, makes one range.
const maxRanges = 1000

// Words collects the spool records that a batch released, and tells their
// ingresses. It is not safe for concurrent use: each loop has its own.
type Words struct {
	conn     *nats.Conn
	released map[spool][]uint64
}

// spool is one process start of one ingress.
type spool struct{ ingress, start string }

// NewWords makes an empty collection that publishes on the connection.
func NewWords(conn *nats.Conn) *Words {
	return &Words{conn: conn, released: make(map[spool][]uint64)}
}

// Add takes records that are durable elsewhere: call it after the commit only.
// Zero refs are left out.
func (w *Words) Add(refs ...capture.SpoolRef) {
	for _, ref := range refs {
		if ref.Ingress == "" {
			continue
		}
		key := spool{ref.Ingress, ref.Start}
		w.released[key] = append(w.released[key], ref.Index)
	}
}

// Publish sends what was collected, one message for each start of an ingress
// unless that would be too large, and forgets it. Nobody acknowledges a word,
// and one that cannot be sent is lost: the ingress then publishes its records
// again, and the repeat earns the word again. So there is no error to return.
func (w *Words) Publish() {
	for key, indexes := range w.released {
		subject := capture.CommittedSubject(key.ingress)
		for ranges := range slices.Chunk(merge(indexes), maxRanges) {
			_ = w.conn.Publish(subject, capture.Word{Start: key.start, Released: ranges}.Encode())
		}
		delete(w.released, key)
	}
}

// merge makes ranges of indexes, which it sorts.
func merge(indexes []uint64) [][2]uint64 {
	slices.Sort(indexes)
	var ranges [][2]uint64
	for _, i := range indexes {
		if last := len(ranges) - 1; last >= 0 && i-ranges[last][1] <= 1 {
			ranges[last][1] = i
			continue
		}
		ranges = append(ranges, [2]uint64{i, i})
	}
	return ranges
}
