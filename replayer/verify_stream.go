package replayer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// verifyFence is what has arrived in the ledger of what was durable at a time.
type verifyFence struct {
	at time.Time // by the ledger's clock
	// last are the ends of the streams then, floors the durables' ack floors
	// when the wait was over.
	last, floor map[string]uint64
	requests    bool            // the recorder has committed its stream up to last
	behind      map[string]bool // ingresses that may hold records of before
}

// clockSlack is how well the ledger's clock is known to say when an ingress had
// released something: to a trip of a heartbeat, and this is far above one.
const clockSlack = 250 * time.Millisecond

// passed reports whether an ingress has released everything of before.
func (f *verifyFence) passed(ingress string) bool { return !f.behind[ingress] }

func (f *verifyFence) allPassed() bool { return len(f.behind) == 0 }

// settle waits until what was durable when it was called has reached the ledger,
// for the timeout at most.
func (v *verifier) settle(ctx context.Context) error {
	f := &v.fence
	f.last, f.floor = make(map[string]uint64), make(map[string]uint64)
	v.settled = true
	// The ends of the streams first: what they hold was in a spool before f.at.
	if _, err := v.look(ctx); err != nil {
		return err
	}
	now, err := v.Ledger.Now(ctx)
	if err != nil {
		return err
	}
	f.at = now.Add(clockSlack)
	began := v.Clock.Now()
	for {
		waits, err := v.look(ctx)
		if err != nil {
			return err
		}
		if len(waits) == 0 {
			v.out.Settled = true
			return nil
		}
		if v.Clock.Now().Sub(began) >= v.Timeout {
			v.out.Waits = waits
			return nil
		}
		if err := v.Clock.Sleep(ctx, fencePoll); err != nil {
			return err
		}
	}
}

// look gives what is still waited for.
func (v *verifier) look(ctx context.Context) ([]string, error) {
	f := &v.fence
	var waits []string
	for _, s := range []struct{ stream, durable string }{
		{capture.RequestsStream, capture.RecorderDurable}, {capture.CompletionsStream, capture.AckerDurable},
	} {
		floor, last, err := v.floor(ctx, s.stream, s.durable)
		if err != nil {
			return nil, err
		}
		if floor > last {
			return nil, fmt.Errorf("the %s's consumer is ahead of its stream (%d, the stream ends at %d): the stream was rolled back; restart nats-server, which mends the consumer", s.durable, floor, last)
		}
		if _, ok := f.last[s.stream]; !ok {
			f.last[s.stream] = last
		}
		f.last[s.stream] = min(f.last[s.stream], last) // a rollback: what was lost with it comes again
		f.floor[s.stream] = floor
		if s.stream == capture.RequestsStream {
			f.requests = floor >= f.last[s.stream]
		}
		if floor < f.last[s.stream] {
			waits = append(waits, fmt.Sprintf("the %s is %d messages behind", s.durable, f.last[s.stream]-floor))
		}
	}
	list, err := v.Ledger.Ingresses(ctx)
	if err != nil {
		return nil, err
	}
	f.behind = make(map[string]bool)
	for i := range list {
		if wait := f.holds(&list[i]); wait != "" && !slices.Contains(v.Ignore, list[i].ID) {
			f.behind[list[i].ID] = true
			waits = append(waits, wait)
		}
	}
	return waits, nil
}

// holds says what an ingress may hold of before, empty for nothing.
func (f *verifyFence) holds(i *ledger.Ingress) string {
	switch {
	case i.SeenAt.Unix() <= 0:
		return fmt.Sprintf("ingress %s was never heard from, and requests of it are known (start it, or --ignore-ingress %s)", i.ID, i.ID)
	case i.SeenAt.Before(f.at):
		return fmt.Sprintf("ingress %s was not heard from since %s (start it, or --ignore-ingress %s)", i.ID, stamp(i.SeenAt), i.ID)
	case !i.OldestUnreleased.IsZero() && i.OldestUnreleased.Before(f.at):
		return fmt.Sprintf("ingress %s has %d records unreleased, the oldest since %s", i.ID, i.Unreleased, stamp(i.OldestUnreleased))
	}
	return ""
}

// floor gives the ack floor of a durable and the end of its stream. The floor
// comes first: see [passage.lookAtAcker].
func (v *verifier) floor(ctx context.Context, name, durable string) (floor, last uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	c, err := v.JS.Consumer(ctx, name, durable)
	if err != nil {
		return 0, 0, fmt.Errorf("look at consumer %s of %s: %w", durable, name, unreachable(err))
	}
	s, err := v.JS.Stream(ctx, name)
	if err != nil {
		return 0, 0, fmt.Errorf("look at stream %s: %w", name, unreachable(err))
	}
	return c.CachedInfo().AckFloor.Stream, s.CachedInfo().State.LastSeq, nil
}

// readRequests takes the captures in the requests stream. Bodies stay where they
// are: the headers say enough.
func (v *verifier) readRequests(ctx context.Context) error {
	const name = capture.RequestsStream
	floor := v.fence.floor[name]
	return v.read(ctx, name, true, func(m jetstream.Msg, seq uint64) error {
		params := m.Headers().Get(capture.HeaderCapture)
		id, err := uuid.Parse(m.Headers().Get(capture.HeaderID))
		if err != nil || kindOf(params) == "" {
			if seq > floor {
				return nil
			}
			return v.unreadable(ctx, name, seq, "it is no capture")
		}
		if kindOf(params) != "request" {
			return nil // a part of one, or of none
		}
		return v.see(ctx, sighting{id: id, from: fromRequests, counted: true, pending: seq > floor, stream: name, seq: seq})
	})
}

// readCompletions takes outcomes and events.
func (v *verifier) readCompletions(ctx context.Context) error {
	const name = capture.CompletionsStream
	floor := v.fence.floor[name]
	return v.read(ctx, name, false, func(m jetstream.Msg, seq uint64) error {
		pending := seq > floor
		var err error
		switch {
		case capture.IsOutcomeSubject(m.Subject()):
			var outcomes []capture.Outcome
			outcomes, err = capture.DecodeOutcomes(m.Data())
			for i := range outcomes {
				o := &outcomes[i]
				if err := v.see(ctx, sighting{id: o.ID, from: fromOutcomes, counted: true, pending: pending, outcome: o, stream: name, seq: seq}); err != nil {
					return err
				}
			}
		case capture.IsEventSubject(m.Subject()):
			var events []capture.Event
			events, err = capture.DecodeEvents(m.Data(), maxVerifyEvents)
			for i := range events {
				e := &events[i]
				if err := v.see(ctx, sighting{id: e.ID, from: fromOutcomes, pending: pending, event: e, stream: name, seq: seq}); err != nil {
					return err
				}
			}
		default:
			err = errors.New("its subject is neither that of an outcome nor that of an event")
		}
		if err != nil && !pending {
			return v.unreadable(ctx, name, seq, err.Error())
		}
		return nil
	})
}

// maxVerifyEvents is how many events of one message are looked at: more than the
// acker takes.
const maxVerifyEvents = 100_000

// Bounds of reading a stream.
const (
	// readAhead is what the client holds of a stream.
	readAhead = 8 << 20
	// readWait is how long a message may take, and readIdle how long the server
	// keeps the consumer of a process that was killed.
	readWait = 5 * time.Second
	readIdle = 30 * time.Second
)

// read gives the messages of a stream up to where it ended at the fence, by a
// consumer that acknowledges nothing and goes away.
func (v *verifier) read(ctx context.Context, name string, headersOnly bool, f func(m jetstream.Msg, seq uint64) error) (err error) {
	s, err := v.JS.Stream(ctx, name)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, unreachable(err))
	}
	state, last := s.CachedInfo().State, v.fence.last[name]
	v.out.Streams[name] = StreamRead{First: state.FirstSeq, Last: last, Floor: v.fence.floor[name]}
	if state.Msgs == 0 || last < state.FirstSeq {
		return nil
	}
	c, err := s.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverAllPolicy, HeadersOnly: headersOnly, InactiveThreshold: readIdle,
	})
	if err != nil {
		return fmt.Errorf("read %s: %w", name, unreachable(err))
	}
	messages, err := c.Messages(jetstream.PullMaxBytes(readAhead))
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	defer messages.Stop()
	for {
		waiting, cancel := context.WithTimeout(ctx, readWait)
		m, err := messages.Next(jetstream.NextContext(waiting))
		cancel()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, context.DeadlineExceeded):
			// Has the end gone, by a rollback or a purge?
			info, infoErr := s.Info(ctx)
			if infoErr == nil && (info.State.Msgs == 0 || info.State.LastSeq < last || info.State.FirstSeq > last) {
				return nil
			}
			return fmt.Errorf("read %s: nats does not answer: %w", name, errors.Join(err, infoErr))
		case err != nil:
			return fmt.Errorf("read %s: %w", name, err)
		}
		meta, err := m.Metadata()
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		seq := meta.Sequence.Stream
		if seq > last {
			return nil
		}
		if err := f(m, seq); err != nil {
			return err
		}
		if seq == last {
			return nil
		}
	}
}

// unreadable names an acknowledged message, unless it is set aside.
func (v *verifier) unreadable(ctx context.Context, name string, seq uint64, why string) error {
	aside, err := v.isAside(ctx, name, seq)
	if err != nil || aside {
		return err
	}
	v.gap(Gap{Kind: GapUnreadable, Detail: fmt.Sprintf("message %d of %s, acknowledged and not set aside: %s", seq, name, printable(why))})
	return nil
}

// errNoReason stands where only a fingerprint is asked for.
var errNoReason = errors.New("none")

// isAside reports whether the message is among those set aside, by its
// fingerprint.
func (v *verifier) isAside(ctx context.Context, name string, seq uint64) (bool, error) {
	if len(v.asides.prints) == 0 {
		return false, nil
	}
	s, err := v.JS.Stream(ctx, name)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", name, unreachable(err))
	}
	raw, err := s.GetMsg(ctx, seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, nil // trimmed meanwhile: a false alarm is better than none
	}
	if err != nil {
		return false, fmt.Errorf("read message %d of %s: %w", seq, name, unreachable(err))
	}
	header := maps.Clone(raw.Header)
	// Where the server gives the message directly, it says by headers which it is.
	maps.DeleteFunc(header, func(key string, _ []string) bool {
		return slices.Contains([]string{"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Num-Pending", "Nats-Last-Sequence"}, key)
	})
	m := stream.Msg{Subject: raw.Subject, Header: header, Data: raw.Data}
	return v.asides.prints[m.Aside("", errNoReason).Fingerprint], nil
}
