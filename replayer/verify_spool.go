package replayer

import (
	"context"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/spool"
)

// readSpool takes what stands in a spool, released or not.
func (v *verifier) readSpool(ctx context.Context, dir string) error {
	err := spool.Scan(ctx, dir, func(rec spool.Record) error {
		msg, err := capture.ParseRecord(rec.Data)
		if err != nil {
			return nil // its ingress sets it aside
		}
		if capture.IsOutcomeSubject(msg.Subject) {
			o, err := capture.DecodeOutcome(msg.Data)
			if err != nil {
				return nil
			}
			return v.see(ctx, sighting{id: o.ID, from: fromSpools, ingress: o.Ingress, outcome: &o})
		}
		id, err := uuid.Parse(msg.ID)
		if err != nil || kindOf(msg.Capture) != "request" {
			return nil
		}
		return v.see(ctx, sighting{id: id, from: fromSpools, counted: true, ingress: paramOf(msg.Capture, "ingress")})
	})
	if err != nil {
		return err
	}
	return spool.ScanAside(ctx, dir, func(a spool.Aside, data []byte) error {
		msg, err := capture.ParseRecord(data)
		if err != nil {
			return nil // it names nothing
		}
		if capture.IsOutcomeSubject(msg.Subject) {
			if o, err := capture.DecodeOutcome(msg.Data); err == nil {
				v.movedFacts[o.ID] = true
			}
			return nil
		}
		if kindOf(msg.Capture) != "request" {
			return nil
		}
		if id, err := uuid.Parse(msg.ID); err == nil {
			v.moved[id] = true
			v.lost[startID{paramOf(msg.Capture, "ingress"), a.Start}]++
		}
		return nil
	})
}

// kindOf and paramOf read a [capture.HeaderCapture].
func kindOf(params string) string { return paramOf(params, "kind") }

func paramOf(params, name string) string {
	for param := range strings.SplitSeq(params, ";") {
		if value, ok := strings.CutPrefix(strings.TrimSpace(param), name+"="); ok {
			return value
		}
	}
	return ""
}
