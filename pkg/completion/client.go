package completion

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	// The waits between two tries of one delivery: they double from the first to
	// the last, which is short enough to go on soon after an outage.
	retryMin = 100 * time.Millisecond
	retryMax = 15 * time.Second
	// retryAfterMax bounds what a Retry-After may ask for, so that a wrong one
	// does not stop the reports for hours.
	retryAfterMax = 2 * time.Minute
	// answerMax is how much of an answer is read: a problem is short.
	answerMax = 64 << 10
)

// Stats counts what became of events. Reported = Confirmed + Dropped + Queued
// at any time.
type Stats struct {
	Reported  uint64 // taken by Report
	Confirmed uint64 // of those, durable at the acker
	Dropped   uint64 // of those, given up: refused by the acker, or left at Close
	Queued    uint64 // of those, waiting or on their way
	Refused   uint64 // not taken by Report: the queue was full, or it was closed
	Retries   uint64 // deliveries in the background that failed and were repeated
}

// Client delivers completion events to the acker. All its methods may be
// called concurrently.
//
// Events are delivered in the order of their [Client.Report], at least once: a
// delivery whose answer was lost is repeated, which does no harm. The queue is
// in memory only. What is in it when the process dies is lost; the requests
// concerned stay replayable.
type Client struct {
	opts     Options
	url      string
	http     *http.Client
	ownHTTP  bool
	queue    chan Event    // closed by Close
	closing  chan struct{} // closed by Close: wakes a wait between two tries
	done     chan struct{} // closed when run has returned
	abortCtx context.Context
	abort    context.CancelFunc // ends every delivery in the background
	hurried  bool               // run's own: a wait was cut short because of Close

	mu     sync.Mutex // guards what follows, and the sending end of queue
	closed bool
	left   int   // events that Close could not deliver
	stats  Stats // Queued is computed
}

// New checks the options and starts a client. The error names all problems.
// The acker need not be reachable yet. The caller must [Client.Close] it.
func New(opts Options) (*Client, error) {
	target, err := opts.endpoint()
	if err != nil {
		return nil, err
	}
	c := &Client{
		opts:    opts,
		url:     target,
		http:    opts.HTTPClient,
		queue:   make(chan Event, opts.MaxQueue),
		closing: make(chan struct{}),
		done:    make(chan struct{}),
	}
	if c.http == nil {
		c.ownHTTP = true
		c.http = &http.Client{
			Transport: &http.Transport{
				Proxy:               http.ProxyFromEnvironment,
				IdleConnTimeout:     90 * time.Second,
				TLSHandshakeTimeout: 10 * time.Second,
				ForceAttemptHTTP2:   true,
			},
			// A redirect is a wrong URL, and would turn the POST into a GET.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
	}
	c.abortCtx, c.abort = context.WithCancel(context.Background())
	go c.run()
	return c, nil
}

// Report queues an event for its delivery and never blocks. A nil error says
// that the client will try until [Client.Close]; it does not say that the
// event is durable. Otherwise the event is not taken, and the error wraps
// [ErrQueueFull], [ErrClosed] or [ErrEvent]. The request then stays as it is:
// the caller may report it again, or leave it to come again.
func (c *Client) Report(e Event) error {
	e, err := e.normal()
	if err != nil {
		return fmt.Errorf("report completion: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		c.stats.Refused++
		return fmt.Errorf("report completion: %w", ErrClosed)
	}
	select {
	case c.queue <- e:
		c.stats.Reported++
		return nil
	default:
		c.stats.Refused++
		return fmt.Errorf("report completion: %w", ErrQueueFull)
	}
}

// ReportNow delivers one event at once, past the queue, and returns nil when it
// is durable at the acker. It repeats a delivery that failed for a reason that
// may pass, until ctx ends or [Options.Timeout] is over. An error that wraps
// [ErrRefused] or [ErrEvent] says that the acker does not have the event; with
// any other error it may have it. ReportNow is not counted in [Stats].
func (c *Client) ReportNow(ctx context.Context, e Event) error {
	e, err := e.normal()
	if err != nil {
		return fmt.Errorf("report completion: %w", err)
	}
	if c.isClosed() {
		return fmt.Errorf("report completion: %w", ErrClosed)
	}
	ctx, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	for tries := 0; ; tries++ {
		err := c.post(ctx, []Event{e})
		if err == nil {
			return nil
		}
		var answer *answerError
		if errors.As(err, &answer) && !answer.passing() {
			return fmt.Errorf("report completion: %w: %w", ErrRefused, err)
		}
		if pause(ctx, nil, retryWait(tries, err)) != nil {
			return fmt.Errorf("report completion: %w", err)
		}
	}
}

// Close takes no more events, delivers what is queued, and returns when
// nothing is left. When ctx ends before that, what is left is dropped (see
// [Options.OnDrop]) and the error says how many events that were; give it a
// deadline, for an acker that is away would keep Close for ever. Close may be
// called again; later calls wait like the first and report the same loss.
func (c *Client) Close(ctx context.Context) error {
	c.mu.Lock()
	if !c.closed {
		c.closed = true
		close(c.queue)
		close(c.closing)
	}
	c.mu.Unlock()

	select {
	case <-c.done:
	case <-ctx.Done():
		c.abort()
		<-c.done // soon: every delivery and every wait ends with abort
	}
	c.abort()
	if c.ownHTTP {
		c.http.CloseIdleConnections()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.left; n > 0 {
		return fmt.Errorf("close completion client: %d events not delivered: %w", n, ErrClosed)
	}
	return nil
}

// Stats returns the counters as of now.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Queued = s.Reported - s.Confirmed - s.Dropped
	return s
}

func (c *Client) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// run delivers the queue until it is closed and empty.
func (c *Client) run() {
	defer close(c.done)
	batch := make([]Event, 0, c.opts.MaxBatch)
	for first := range c.queue {
		batch = c.fill(append(batch[:0], first))
		c.deliver(batch)
		clear(batch) // let go of the details
	}
}

// fill adds events to the batch until it is full, FlushEvery is over, or the
// queue is closed and empty.
func (c *Client) fill(batch []Event) []Event {
	timer := time.NewTimer(c.opts.FlushEvery)
	defer timer.Stop()
	for len(batch) < c.opts.MaxBatch {
		select {
		case e, ok := <-c.queue:
			if !ok {
				return batch
			}
			batch = append(batch, e)
		case <-timer.C:
			return batch
		}
	}
	return batch
}

// deliver returns when each event of the batch is confirmed or dropped. It
// changes the batch.
func (c *Client) deliver(batch []Event) {
	for tries := 0; len(batch) > 0; {
		err := c.post(c.abortCtx, batch)
		if err == nil {
			c.count(func(s *Stats) { s.Confirmed += uint64(len(batch)) })
			return
		}
		var answer *answerError
		if errors.As(err, &answer) && answer.aboutEvents() {
			// The acker takes all or nothing, and names one event at fault.
			// Where none is named, as by a proxy with limits of its own, halves
			// find it.
			switch i := answer.index; {
			case len(batch) == 1:
				c.drop(batch[0], fmt.Errorf("%w: %w", ErrRefused, err))
				return
			case i >= 0 && i < len(batch):
				c.drop(batch[i], fmt.Errorf("%w: %w", ErrRefused, err))
				batch = append(batch[:i], batch[i+1:]...)
			default:
				half := len(batch) / 2
				c.deliver(batch[:half:half])
				batch = batch[half:]
			}
			tries = 0
			continue
		}
		if c.abortCtx.Err() != nil {
			c.giveUp(batch, err)
			return
		}
		wait := retryWait(tries, err)
		tries++
		c.count(func(s *Stats) { s.Retries++ })
		c.opts.Logger.Warn("completions not delivered, trying again", "err", err, "events", len(batch), "retry_in", wait)
		wake := c.closing
		if c.hurried {
			wake = nil // closed for good: it would not wait any more
		}
		_ = pause(c.abortCtx, wake, wait) // aborted: the next delivery fails and gives up
		if !c.hurried && c.isClosed() {
			c.hurried, tries = true, 0 // Close may have little time
		}
	}
}

// giveUp drops what Close could not deliver.
func (c *Client) giveUp(batch []Event, err error) {
	c.mu.Lock()
	c.left += len(batch)
	c.mu.Unlock()
	for _, e := range batch {
		c.drop(e, fmt.Errorf("%w: %w", ErrClosed, err))
	}
}

func (c *Client) count(change func(*Stats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.stats)
}

// drop counts and announces an event that Report took and that is given up.
func (c *Client) drop(e Event, err error) {
	c.count(func(s *Stats) { s.Dropped++ })
	c.announce(e, err)
}

// announce tells of an event that is given up.
func (c *Client) announce(e Event, err error) {
	if c.opts.OnDrop != nil {
		c.opts.OnDrop(e, err)
		return
	}
	c.opts.Logger.Warn("completion dropped", "request_id", e.ID, "outcome", string(e.Outcome), "err", err)
}

// post delivers the events once. The error is an *answerError when the acker,
// or something before it, answered anything but 202.
func (c *Client) post(ctx context.Context, events []Event) error {
	body, err := json.Marshal(events)
	if err != nil {
		return fmt.Errorf("encode events: %w", err)
	}
	token := c.opts.Token
	if c.opts.TokenFile != "" {
		if token, err = readToken(c.opts.TokenFile); err != nil {
			return fmt.Errorf("read token: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err // names method and URL
	}
	defer resp.Body.Close()
	answer, readErr := io.ReadAll(io.LimitReader(resp.Body, answerMax))
	// Only 202 promises that the events are durable. A 200 comes from
	// something that is not an acker.
	if resp.StatusCode == http.StatusAccepted {
		return nil
	}
	return newAnswerError(resp, answer, readErr)
}

// answerError is an answer other than 202.
type answerError struct {
	status     int
	detail     string        // the problem's detail, or how the answer begins
	index      int           // of the event at fault, -1 when none is named
	retryAfter time.Duration // 0 when none is asked for
}

func newAnswerError(resp *http.Response, body []byte, readErr error) *answerError {
	e := &answerError{status: resp.StatusCode, index: -1, retryAfter: parseRetryAfter(resp.Header.Get("Retry-After"))}
	var problem struct {
		Title  string `json:"title"`
		Detail string `json:"detail"`
		Item   *int   `json:"item"`
	}
	switch {
	case json.Unmarshal(body, &problem) == nil:
		if e.detail = problem.Detail; e.detail == "" {
			e.detail = problem.Title
		}
		if problem.Item != nil {
			e.index = *problem.Item
		}
	case readErr != nil:
		e.detail = readErr.Error()
	default:
		e.detail = cut(string(body), 200)
	}
	return e
}

func (e *answerError) Error() string {
	text := "acker answered " + strconv.Itoa(e.status)
	if e.detail != "" {
		text += fmt.Sprintf(": %q", e.detail)
	}
	return text
}

// aboutEvents says that the same events would get the same answer for ever.
func (e *answerError) aboutEvents() bool {
	return e.status == http.StatusBadRequest || e.status == http.StatusRequestEntityTooLarge
}

// passing says that the same request may succeed without anybody changing a
// setting.
func (e *answerError) passing() bool {
	return e.status >= 500 || e.status == http.StatusRequestTimeout ||
		e.status == http.StatusTooEarly || e.status == http.StatusTooManyRequests
}

// parseRetryAfter reads seconds or an HTTP date. It returns 0 for anything
// else and for the past, and at most retryAfterMax.
func parseRetryAfter(value string) time.Duration {
	var d time.Duration
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		d = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = time.Until(at)
	}
	return min(max(d, 0), retryAfterMax)
}

// retryWait is how long to wait after the given number of earlier retries and
// this error: at random between half and the whole of a bound that doubles, and
// at least what a Retry-After asks for.
func retryWait(tries int, err error) time.Duration {
	bound := min(retryMin<<min(tries, 20), retryMax)
	wait := bound/2 + rand.N(bound/2)
	var answer *answerError
	if errors.As(err, &answer) && answer.retryAfter > 0 {
		// The share at random keeps many clients from coming back together.
		wait = answer.retryAfter + rand.N(min(answer.retryAfter, retryMax)/10+1)
	}
	return wait
}

// pause waits for d, and less when wake is closed. It returns an error when
// ctx ends first.
func pause(ctx context.Context, wake <-chan struct{}, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-wake:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
