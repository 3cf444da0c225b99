package exchange

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/route"
)

// Ingress is the name under which imported requests stand in the ledger, where
// captured ones have that of their ingress.
const Ingress = "import"

// Recorder is what is written of the ledger.
type Recorder interface {
	Record(ctx context.Context, items []ledger.Item) ([]ledger.Result, error)
}

// ImportOptions say what is imported, and as what.
type ImportOptions struct {
	Ledger Recorder
	Reader Reader
	// Route gives the route of a request, nil where none takes it.
	Route func(host, target, method string) *route.Route
	// Now bounds times. A request that is at most a day ahead was received now.
	Now time.Time
	// Refused is called for each item that is not taken.
	Refused func(number int, reason string)
}

// Imported counts what became of a file. Every item that is a request is in one
// of New, Known and Refused.
type Imported struct {
	New      int // recorded
	Known    int // were in the ledger
	Refused  int
	Redacted int // of New and Known: a value that the export had left out is not there
}

// Bounds of a batch, which is one transaction.
const (
	batchItems = 500
	batchBytes = 4 << 20
	// chunkBytes is the size of a part of a body above inlineBody, as the gateway
	// makes it: the ledger gives such a body back in parts.
	chunkBytes = 256 << 10
	inlineBody = 512 << 10
)

// ahead is how far the clock of whoever wrote a file may be ahead of the ledger's:
// by the wrong time zone, at most.
const ahead = 24 * time.Hour

// Import records the requests of one file. With an error, of reading or of the
// ledger, the counts tell what was done before; importing the file again does
// the rest.
//
// A request is received at its own time, under the policy of its route. Where the
// answer decides (capture.ByResponse) its grace is 0, for nobody works on it: a
// run may send it at once, or, where it is younger than the route's timeout, when
// that is over. Where a completion event decides it keeps the grace of the route,
// which a replay's own answer needs, and waits for it once.
func Import(ctx context.Context, o ImportOptions) (Imported, error) {
	im := importer{ImportOptions: o, seen: make(map[[16]byte]int)}
	err := im.read(ctx)
	if !errors.Is(err, errLedger) {
		err = errors.Join(err, im.flush(ctx))
	}
	return im.Imported, err
}

var errLedger = errors.New("record")

type importer struct {
	ImportOptions
	Imported
	seen  map[[16]byte]int // how often a content was met in this file
	batch []ledger.Item
	// numbers are those of the requests in the batch, 0 for chunks.
	numbers []int
	bytes   int
}

func (im *importer) read(ctx context.Context) error {
	for {
		e, err := im.Reader.Next()
		if wrong, ok := errors.AsType[*ItemError](err); ok {
			im.refuse(wrong.Number, wrong.Reason)
			continue
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := im.take(ctx, &e); err != nil {
			return err
		}
	}
}

func (im *importer) refuse(number int, reason string) {
	im.Imported.Refused++
	if im.ImportOptions.Refused != nil {
		im.ImportOptions.Refused(number, reason)
	}
}

func (im *importer) take(ctx context.Context, e *Entry) error {
	if e.At.Unix() < 0 || e.At.After(im.Now.Add(ahead)) {
		im.refuse(e.Number, "its time is before 1970 or in the future")
		return nil
	}
	at := e.At
	if at.After(im.Now) {
		at = im.Now
	}
	_, host, _ := forwarded(e.Fields)
	if host == "" {
		host = e.Host
	}
	rt := im.Route(host, e.Target, e.Method)
	if rt == nil {
		im.refuse(e.Number, "no route takes it; give --route")
		return nil
	}
	q, body, digest, redacted, err := e.content(rt.Upstream.Host)
	if err != nil {
		im.refuse(e.Number, err.Error())
		return nil
	}
	if int64(len(e.Body)) > rt.MaxBody {
		im.refuse(e.Number, fmt.Sprintf("its body has %d bytes, and route %s takes %d", len(e.Body), rt.Name, rt.MaxBody))
		return nil
	}
	id := e.ID
	if id == uuid.Nil || id.Version() != 7 || e.Digest != digest {
		id = newID(e.At, digest, e.Mark, im.occurrence(e, digest))
	}
	if redacted {
		im.Redacted++
	}
	policy := rt.Policy
	if policy.By == capture.ByResponse {
		policy.Grace = 0
	}
	r := &capture.Request{
		ID: id, Route: rt.Name, Ingress: Ingress, ReceivedAt: at, Policy: policy, OrderKey: orderKey(rt, &q),
		Head: q.appendHead(nil), Size: int64(len(body)),
	}
	if len(body) <= inlineBody {
		r.Body = body
		return im.add(ctx, ledger.Item{Captured: capture.Captured{Request: r}}, e.Number, len(r.Head)+len(body))
	}
	sum := sha256.Sum256(body)
	r.SHA256 = hex.EncodeToString(sum[:])
	for len(body) > 0 {
		part := body[:min(len(body), chunkBytes)]
		body = body[len(part):]
		c := &capture.Chunk{ID: id, Route: rt.Name, Ingress: Ingress, Number: r.Chunks, Data: part}
		r.Chunks++
		if err := im.add(ctx, ledger.Item{Captured: capture.Captured{Chunk: c}}, 0, len(part)); err != nil {
			return err
		}
	}
	// The head comes last: a request that was recorded in part is none.
	return im.add(ctx, ledger.Item{Captured: capture.Captured{Request: r}}, e.Number, len(r.Head))
}

// occurrence is 0 for the first of those in a file that are equal in content,
// time and name, 1 for the second, and so on.
func (im *importer) occurrence(e *Entry, digest string) int {
	sum := sha256.Sum256([]byte(fmt.Sprint(e.At.UnixNano(), "\n", digest, "\n", e.Mark)))
	key := [16]byte(sum[:16])
	nth := im.seen[key]
	im.seen[key] = nth + 1
	return nth
}

func (im *importer) add(ctx context.Context, item ledger.Item, number, size int) error {
	im.batch, im.numbers = append(im.batch, item), append(im.numbers, number)
	if im.bytes += size; im.bytes < batchBytes && len(im.batch) < batchItems {
		return nil
	}
	return im.flush(ctx)
}

func (im *importer) flush(ctx context.Context) error {
	if len(im.batch) == 0 {
		return nil
	}
	results, err := im.Ledger.Record(ctx, im.batch)
	if err != nil {
		return fmt.Errorf("%w: %w", errLedger, err)
	}
	for i, r := range results {
		switch number := im.numbers[i]; {
		case r.Err != nil && number > 0:
			im.refuse(number, r.Err.Error())
		case r.Err != nil || number == 0: // the head says what became of it
		case r.New:
			im.New++
		default:
			im.Known++
		}
	}
	im.batch, im.numbers, im.bytes = nil, nil, 0
	return nil
}

// maxOrderKey is the gateway's bound of an ordering key; what is longer travels
// as its digest.
const maxOrderKey = 256

// orderKey is the request's ordering key, as the gateway makes it.
func orderKey(rt *route.Route, q *request) string {
	if rt.OrderBy == "" {
		return ""
	}
	key := strings.Join(q.fields.Values(rt.OrderBy), ",")
	if len(key) > maxOrderKey {
		sum := sha256.Sum256([]byte(key))
		return "sha256:" + hex.EncodeToString(sum[:])
	}
	return key
}
