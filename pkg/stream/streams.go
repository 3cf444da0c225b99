package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// Streams says how large the streams are and how often they are kept.
type Streams struct {
	Replicas int   // of each stream
	MaxBytes int64 // of the requests stream; the completions stream has a quarter
}

const (
	// duplicates is the window in which a Nats-Msg-Id is remembered: 126 bytes
	// of memory each. Holdfast sends none, the ledger knows repeats by the UUID;
	// this is for an API that sends one and tries again at once.
	duplicates = 5 * time.Second
	// ackWait is how long the server waits for an acknowledgement before it
	// sends a message again: how long what a killed process had in hand stays
	// untouched, and a replay waits for it. A commit takes milliseconds; a longer
	// one says that it is in progress at a third of this.
	ackWait = 10 * time.Second
	// maxAckPending bounds what is delivered and not acknowledged, over all
	// processes that share a consumer: room for ten of them with four batches of
	// 500 each.
	maxAckPending = 20_000
	// minCompletions keeps a completions stream usable beside a tiny requests
	// stream.
	minCompletions = 1 << 20
	// apiTimeout bounds one request to JetStream's API. A leader election takes
	// a few seconds.
	apiTimeout = 10 * time.Second
)

// CompletionsBytes is the size of the completions stream: a quarter of
// MaxBytes. An outcome has some 250 bytes beside a request of 1 KiB and more,
// and both streams are trimmed alike.
func (s Streams) CompletionsBytes() int64 { return max(s.MaxBytes/4, minCompletions) }

// StoreBytes is what both streams reserve on a server: the least that its
// max_store may be.
func (s Streams) StoreBytes() int64 { return s.MaxBytes + s.CompletionsBytes() }

// plan is one stream and its consumer.
type plan struct {
	stream, subject, durable string
	maxBytes                 int64
	replicas                 int
}

func (s Streams) plans() []plan {
	return []plan{
		{capture.RequestsStream, capture.RequestsSubjects, capture.RecorderDurable, s.MaxBytes, s.Replicas},
		{capture.CompletionsStream, capture.CompletionsSubjects, capture.AckerDurable, s.CompletionsBytes(), s.Replicas},
	}
}

// Provision makes both streams and their consumers, or changes them to what
// they must be. Settings that Holdfast has no opinion about, such as placement
// or metadata, stay as they are. It takes a user that may create streams.
// Nothing that a stream holds is deleted.
func Provision(ctx context.Context, js jetstream.JetStream, s Streams) error {
	for _, p := range s.plans() {
		if err := p.provision(ctx, js); err != nil {
			return fmt.Errorf("provision %s: %w", p.stream, err)
		}
	}
	return nil
}

func (p plan) provision(ctx context.Context, js jetstream.JetStream) error {
	ctx, cancel := context.WithTimeout(ctx, 3*apiTimeout)
	defer cancel()
	var config jetstream.StreamConfig
	stream, err := js.Stream(ctx, p.stream)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		p.setStream(&config)
		if stream, err = js.CreateStream(ctx, config); err != nil {
			return fmt.Errorf("create stream: %w", err)
		}
	case err != nil:
		return fmt.Errorf("look at stream: %w", err)
	default:
		config = stream.CachedInfo().Config
		if len(p.streamDifferences(config)) > 0 {
			p.setStream(&config)
			if stream, err = js.UpdateStream(ctx, config); err != nil {
				return fmt.Errorf("update stream: %w", err)
			}
		}
	}
	var consumer jetstream.ConsumerConfig
	c, err := stream.Consumer(ctx, p.durable)
	switch {
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		p.setConsumer(&consumer)
		if _, err := stream.CreateConsumer(ctx, consumer); err != nil {
			return fmt.Errorf("create consumer %s: %w", p.durable, err)
		}
	case err != nil:
		return fmt.Errorf("look at consumer %s: %w", p.durable, err)
	default:
		consumer = c.CachedInfo().Config
		if len(p.consumerDifferences(consumer)) > 0 {
			p.setConsumer(&consumer)
			if _, err := stream.UpdateConsumer(ctx, consumer); err != nil {
				return fmt.Errorf("update consumer %s: %w", p.durable, err)
			}
		}
	}
	return nil
}

func (p plan) setStream(c *jetstream.StreamConfig) {
	c.Name = p.stream
	c.Subjects = []string{p.subject}
	c.Retention = jetstream.LimitsPolicy
	c.Storage = jetstream.FileStorage
	c.Discard = jetstream.DiscardNew
	c.MaxBytes = p.maxBytes
	c.MaxMsgs, c.MaxMsgsPerSubject, c.MaxMsgSize = -1, -1, -1
	c.MaxAge = 0
	c.Duplicates = duplicates
	c.Replicas = p.replicas
	c.DenyDelete = true
	c.AllowDirect = true
}

func (p plan) setConsumer(c *jetstream.ConsumerConfig) {
	c.Name, c.Durable = p.durable, p.durable
	c.AckPolicy = jetstream.AckExplicitPolicy
	c.DeliverPolicy = jetstream.DeliverAllPolicy
	c.ReplayPolicy = jetstream.ReplayInstantPolicy
	c.AckWait = ackWait
	c.MaxDeliver = -1
	c.MaxAckPending = maxAckPending
	c.BackOff = nil
	c.FilterSubject, c.FilterSubjects = "", nil
}

// Check compares the named streams and their consumers, all if none is named,
// with what they must be. The error says everything that is missing or
// different at once, and what to do; it wraps [ErrMissing], [ErrDiffers] or
// both. Any other error means that JetStream could not be asked.
//
// Of JetStream's API it uses STREAM.INFO and CONSUMER.INFO of those streams.
func Check(ctx context.Context, js jetstream.JetStream, s Streams, streams ...string) error {
	return s.check(ctx, js, streams, true)
}

// CheckStreams is Check for those who only publish: it asks for STREAM.INFO
// alone.
func CheckStreams(ctx context.Context, js jetstream.JetStream, s Streams, streams ...string) error {
	return s.check(ctx, js, streams, false)
}

func (s Streams) check(ctx context.Context, js jetstream.JetStream, streams []string, consumers bool) error {
	var missing, different []string
	for _, p := range s.plans() {
		if len(streams) > 0 && !slices.Contains(streams, p.stream) {
			continue
		}
		m, d, err := p.check(ctx, js, consumers)
		if err != nil {
			return fmt.Errorf("check %s: %w", p.stream, err)
		}
		missing, different = append(missing, m...), append(different, d...)
	}
	var errs []error
	if len(missing) > 0 {
		errs = append(errs, fmt.Errorf("%w: %s", ErrMissing, strings.Join(missing, ", ")))
	}
	if len(different) > 0 {
		errs = append(errs, fmt.Errorf("%w: %s", ErrDiffers, strings.Join(different, "; ")))
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf(`%w; run "recorder provision" with a NATS user that may create streams`, errors.Join(errs...))
}

func (p plan) check(ctx context.Context, js jetstream.JetStream, consumers bool) (missing, different []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	stream, err := js.Stream(ctx, p.stream)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return []string{"stream " + p.stream}, nil, nil
	case err != nil:
		return nil, nil, err
	}
	different = p.streamDifferences(stream.CachedInfo().Config)
	if !consumers {
		return nil, different, nil
	}
	c, err := stream.Consumer(ctx, p.durable)
	switch {
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		return []string{"consumer " + p.durable + " of " + p.stream}, different, nil
	case err != nil:
		return nil, nil, err
	}
	return nil, append(different, p.consumerDifferences(c.CachedInfo().Config)...), nil
}

// differences collects what is not as it must be.
type differences struct {
	of    string
	found []string
}

func differ[T comparable](d *differences, field string, is, want T) {
	if is != want {
		d.found = append(d.found, fmt.Sprintf("%s has %s %v instead of %v", d.of, field, is, want))
	}
}

func (p plan) streamDifferences(is jetstream.StreamConfig) []string {
	want := is
	p.setStream(&want)
	d := &differences{of: "stream " + p.stream}
	differ(d, "subjects", strings.Join(is.Subjects, ","), strings.Join(want.Subjects, ","))
	differ(d, "retention", is.Retention, want.Retention)
	differ(d, "storage", is.Storage, want.Storage)
	differ(d, "discard", is.Discard, want.Discard)
	differ(d, "max_bytes", is.MaxBytes, want.MaxBytes)
	differ(d, "max_msgs", is.MaxMsgs, want.MaxMsgs)
	differ(d, "max_msgs_per_subject", is.MaxMsgsPerSubject, want.MaxMsgsPerSubject)
	differ(d, "max_msg_size", is.MaxMsgSize, want.MaxMsgSize)
	differ(d, "max_age", is.MaxAge, want.MaxAge)
	differ(d, "duplicate_window", is.Duplicates, want.Duplicates)
	differ(d, "num_replicas", is.Replicas, want.Replicas)
	differ(d, "deny_delete", is.DenyDelete, want.DenyDelete)
	differ(d, "allow_direct", is.AllowDirect, want.AllowDirect)
	return d.found
}

func (p plan) consumerDifferences(is jetstream.ConsumerConfig) []string {
	want := is
	p.setConsumer(&want)
	d := &differences{of: "consumer " + p.durable + " of " + p.stream}
	differ(d, "ack_policy", is.AckPolicy, want.AckPolicy)
	differ(d, "deliver_policy", is.DeliverPolicy, want.DeliverPolicy)
	differ(d, "ack_wait", is.AckWait, want.AckWait)
	differ(d, "max_deliver", is.MaxDeliver, want.MaxDeliver)
	differ(d, "max_ack_pending", is.MaxAckPending, want.MaxAckPending)
	differ(d, "backoff", len(is.BackOff), len(want.BackOff))
	differ(d, "filter_subject", is.FilterSubject, want.FilterSubject)
	differ(d, "filter_subjects", len(is.FilterSubjects), len(want.FilterSubjects))
	return d.found
}

// Report runs Check until JetStream answers or ctx is done, and logs what is
// missing or different. Consuming goes on all the same: a stream that somebody
// has made larger is no reason to let it fill.
func Report(ctx context.Context, js jetstream.JetStream, s Streams, logger *slog.Logger, streams ...string) {
	for backoff := retryFirst; ctx.Err() == nil; backoff = min(2*backoff, retryLast) {
		err := Check(ctx, js, s, streams...)
		switch {
		case err == nil:
			return
		case errors.Is(err, ErrMissing), errors.Is(err, ErrDiffers):
			logger.Error("streams are not made as they must be", "err", err)
			return
		}
		// Not connected, or no leader yet: whoever consumes says so.
		wait(ctx, backoff)
	}
}
