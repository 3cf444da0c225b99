package ingress

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/spool"
)

// orphan is a body without head.
type orphan struct {
	capture.Abandon
	method string
}

// findOrphans looks for bodies of an earlier start that have chunks and no head
// in the spool: the process was killed before it had read them whole. Where a
// head did reach the ledger, abandoning changes nothing there.
func (p *publisher) findOrphans(ctx context.Context) error {
	found := make(map[uuid.UUID]orphan)
	var decoder capture.Decoder
	own := p.spool.Start()
	_, err := p.pass(ctx, p.spool.UnreleasedBefore(p.spool.Now()), func(rec spool.Record) (bool, error) {
		if rec.Position.Start == own {
			return true, nil
		}
		msg, err := capture.ParseRecord(rec.Data)
		if err != nil || msg.Capture == "" {
			return true, nil // whoever publishes it deals with it
		}
		c, err := decoder.Decode(msg.Subject, capture.Header{capture.HeaderID: {msg.ID}, capture.HeaderCapture: {msg.Capture}}, msg.Data)
		switch {
		case err != nil:
		case c.Chunk != nil:
			method := msg.Subject[strings.LastIndexByte(msg.Subject, '.')+1:]
			found[c.Chunk.ID] = orphan{capture.Abandon{ID: c.Chunk.ID, Route: c.Chunk.Route, Ingress: c.Chunk.Ingress}, method}
		default:
			delete(found, c.ID())
		}
		return true, nil
	})
	p.orphaned = slices.Collect(maps.Values(found))
	return err
}

// abandonOrphans writes an abandon record for each orphan. In a full spool they
// wait: it is publishing that makes room.
func (p *publisher) abandonOrphans() {
	for len(p.orphaned) > 0 {
		o := p.orphaned[0]
		record := o.Message(o.method).AppendEnvelope(nil)
		res, err := p.spool.Reserve(1, int64(len(record)))
		if err == nil {
			_, err = res.AppendWritten(record)
			res.Release()
		}
		if err != nil {
			p.log.Debug("chunks without head are not abandoned yet", "request_id", o.ID.String(), "err", err)
			return
		}
		p.log.Info("chunks of an unfinished body were abandoned", "request_id", o.ID.String())
		p.orphaned = p.orphaned[1:]
	}
}
