package completion

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Defaults of [Options].
const (
	DefaultMaxBatch   = 500
	DefaultFlushEvery = 50 * time.Millisecond
	DefaultMaxQueue   = 16384
	DefaultTimeout    = 10 * time.Second
)

// Options configures a [Client]. Zero values stand for the defaults, except
// that URL is required.
type Options struct {
	// URL is the base address of the acker, such as "http://127.0.0.1:8081".
	URL string

	// Token is the bearer token of the acker. TokenFile names a file that holds
	// it instead; it is read again for every delivery, so that a token can be
	// renewed while the API runs. At most one of them is set. Without either,
	// no Authorization header is sent.
	Token     string
	TokenFile string

	// MaxBatch is the greatest number of events in one delivery.
	MaxBatch int
	// FlushEvery is the longest time that an event waits for company before it
	// is delivered.
	FlushEvery time.Duration
	// MaxQueue is the greatest number of events that wait for their delivery.
	// Up to MaxBatch more are on their way.
	MaxQueue int
	// Timeout bounds one delivery, and the whole of [Client.ReportNow].
	Timeout time.Duration

	// HTTPClient makes the deliveries. By default the client has one of its own
	// that follows no redirects.
	HTTPClient *http.Client

	// OnDrop is called for every event that is given up although
	// [Client.Report] or the middleware took charge of it, with an error that
	// wraps [ErrRefused], [ErrClosed] or [ErrQueueFull]. It is called from
	// several goroutines and must not block: deliveries and handlers wait for
	// it. It must not call [Client.Close]. By default the event is logged as a
	// warning.
	OnDrop func(Event, error)
	// Logger receives a warning for each delivery that failed and is repeated,
	// at most one every 50 milliseconds. By default it is [slog.Default].
	Logger *slog.Logger
}

// endpoint checks the options, sets the defaults, and returns the address to
// post to. The error names all problems.
func (o *Options) endpoint() (string, error) {
	var errs []error
	base, err := url.Parse(o.URL)
	switch {
	case err != nil:
		errs = append(errs, fmt.Errorf("URL: %w", err))
	case base.Scheme != "http" && base.Scheme != "https", base.Host == "":
		errs = append(errs, fmt.Errorf("URL: %q is not an http or https address", o.URL))
	case base.User != nil:
		errs = append(errs, errors.New("URL: takes no user or password; use Token or TokenFile"))
	}
	if o.Token != "" && o.TokenFile != "" {
		errs = append(errs, errors.New("both Token and TokenFile"))
	}
	if o.TokenFile != "" {
		if _, err := readToken(o.TokenFile); err != nil {
			errs = append(errs, fmt.Errorf("TokenFile: %w", err))
		}
	}
	if o.MaxBatch < 0 {
		errs = append(errs, errors.New("negative MaxBatch"))
	}
	if o.FlushEvery < 0 {
		errs = append(errs, errors.New("negative FlushEvery"))
	}
	if o.MaxQueue < 0 {
		errs = append(errs, errors.New("negative MaxQueue"))
	}
	if o.Timeout < 0 {
		errs = append(errs, errors.New("negative Timeout"))
	}
	if err := errors.Join(errs...); err != nil {
		return "", fmt.Errorf("completion options: %w", err)
	}

	if o.MaxBatch == 0 {
		o.MaxBatch = DefaultMaxBatch
	}
	if o.FlushEvery == 0 {
		o.FlushEvery = DefaultFlushEvery
	}
	if o.MaxQueue == 0 {
		o.MaxQueue = DefaultMaxQueue
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return base.JoinPath("v1", "completions").String(), nil
}

// readToken returns the token in the file without the white space around it.
func readToken(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return token, nil
}
