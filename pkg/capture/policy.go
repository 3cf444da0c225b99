package capture

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// CompletionBy says what makes a request processed.
type CompletionBy string

const (
	// ByResponse lets the status of the API's answer decide.
	ByResponse CompletionBy = "response"
	// ByEvent waits for a completion event of the API.
	ByEvent CompletionBy = "event"
)

// Policy is what a route decides about its requests. It travels on the
// captured message, so that recorder, acker and replayer need no routes. It is
// comparable: equal policies are the same policy.
type Policy struct {
	By        CompletionBy
	Processed StatusSet     // statuses that mean processed
	Failed    StatusSet     // statuses that mean failed; every other one means rejected
	Timeout   time.Duration // of the API's whole answer
	Grace     time.Duration // how long past its timeout a request without verdict stays untouched
}

// DefaultPolicy is the policy of a route that says nothing else.
func DefaultPolicy() Policy {
	return Policy{
		By:        ByResponse,
		Processed: "2xx,3xx",
		Failed:    "408,425,429,5xx",
		Timeout:   30 * time.Second,
		Grace:     time.Minute,
	}
}

// staleTokenStatuses smell of a token or a route that was right when the
// request was captured and is not any more. In a replay they are never the
// last word.
const staleTokenStatuses = StatusSet("401,403,404,407")

// Verdict says what an attempt's answer means. status is 0 when there was no
// answer; whole is false when it did not arrive whole; replay is true for every
// attempt but the first try by the ingress.
//
// Under [ByEvent] an answer that would mean processed has no verdict yet.
func (p Policy) Verdict(status int, whole, replay bool) Verdict {
	switch {
	case status == 0 || !whole:
		return Failed
	case replay && staleTokenStatuses.Contains(status):
		return Failed
	}
	// A single status is more specific than a class: "processed: 404" moves it
	// out of 4xx, whichever list the class stands in.
	processed, failed := p.Processed.specificity(status), p.Failed.specificity(status)
	switch {
	case processed > failed:
		if p.By == ByEvent {
			return NoVerdict
		}
		return Processed
	case failed > 0, status >= 500, status < 200:
		return Failed
	default:
		return Rejected
	}
}

// String gives the policy as parameters, the form in which it travels and is
// stored: "by=response; processed=2xx,3xx; failed=408,5xx; timeout=30s; grace=1m0s".
func (p Policy) String() string { return string(p.appendTo(nil)) }

func (p Policy) appendTo(b []byte) []byte {
	b = append(b, "by="...)
	b = append(b, p.By...)
	b = append(b, "; processed="...)
	b = append(b, p.Processed...)
	b = append(b, "; failed="...)
	b = append(b, p.Failed...)
	b = append(b, "; timeout="...)
	b = append(b, p.Timeout.String()...)
	b = append(b, "; grace="...)
	return append(b, p.Grace.String()...)
}

// Validate reports everything that is wrong with the policy.
func (p Policy) Validate() error {
	var errs []error
	if p.By != ByResponse && p.By != ByEvent {
		errs = append(errs, fmt.Errorf("completion %q is not one of response, event", p.By))
	}
	for _, set := range []StatusSet{p.Processed, p.Failed} {
		if err := set.Validate(); err != nil {
			errs = append(errs, err)
		}
	}
	for _, s := range p.Processed.patterns() {
		for _, f := range p.Failed.patterns() {
			if s == f {
				errs = append(errs, fmt.Errorf("status %s is both processed and failed", s))
			}
		}
	}
	if p.Timeout <= 0 {
		errs = append(errs, fmt.Errorf("timeout %s is not positive", p.Timeout))
	}
	if p.Grace < 0 {
		errs = append(errs, fmt.Errorf("grace %s is negative", p.Grace))
	}
	return errors.Join(errs...)
}

// ParsePolicy is the inverse of [Policy.String]. Unknown names are ignored, so
// that a policy of a newer version can be read.
func ParsePolicy(s string) (Policy, error) {
	var p Policy
	var err error
	eachParam(s, func(name, value string) {
		var perr error
		switch name {
		case "by":
			p.By = CompletionBy(value)
		case "processed":
			p.Processed = StatusSet(value)
		case "failed":
			p.Failed = StatusSet(value)
		case "timeout":
			p.Timeout, perr = time.ParseDuration(value)
		case "grace":
			p.Grace, perr = time.ParseDuration(value)
		}
		err = errors.Join(err, perr)
	})
	if err == nil {
		err = p.Validate()
	}
	if err != nil {
		return Policy{}, fmt.Errorf("parse policy %q: %w", s, err)
	}
	return p, nil
}

// StatusSet is a set of HTTP statuses as a comma-separated list of single
// statuses and classes: "408,425,5xx". The empty string is the empty set.
type StatusSet string

// Contains reports whether status is in the set. A malformed element contains
// nothing.
func (s StatusSet) Contains(status int) bool { return s.specificity(status) > 0 }

// specificity is 2 when the set names status itself, 1 when it names its
// class, 0 when it does neither.
func (s StatusSet) specificity(status int) int {
	best := 0
	rest := string(s)
	for rest != "" {
		var one string
		one, rest, _ = strings.Cut(rest, ",")
		if len(one) != 3 || status < 100 || status > 999 || int(one[0]-'0') != status/100 {
			continue
		}
		switch {
		case one[1:] == "xx":
			best = max(best, 1)
		case int(one[1]-'0') == status/10%10 && int(one[2]-'0') == status%10:
			return 2
		}
	}
	return best
}

// Validate names the first element that is neither a status (100 to 599) nor a
// class (1xx to 5xx).
func (s StatusSet) Validate() error {
	for _, one := range s.patterns() {
		class, isClass := strings.CutSuffix(one, "xx")
		n, err := strconv.Atoi(class)
		switch {
		case err == nil && isClass && n >= 1 && n <= 5 && len(one) == 3:
		case err == nil && !isClass && n >= 100 && n <= 599 && len(one) == 3:
		default:
			return fmt.Errorf("status %q is neither a status (100 to 599) nor a class (1xx to 5xx)", one)
		}
	}
	return nil
}

func (s StatusSet) patterns() []string {
	if s == "" {
		return nil
	}
	return strings.Split(string(s), ",")
}

// eachParam calls f for each "name=value" of a list separated by ";".
func eachParam(s string, f func(name, value string)) {
	for s != "" {
		var one string
		one, s, _ = strings.Cut(s, ";")
		if name, value, ok := strings.Cut(strings.TrimSpace(one), "="); ok {
			f(name, value)
		}
	}
}

// GraceEnd is when a request without verdict may be replayed. Grace starts,
// where the last attempt has not ended, at the later of its start plus the
// timeout and the time at which the ledger got to know of it; where it has
// ended, at the time at which the ledger got to know that. So neither clocks
// of other machines nor slow requests cause a repeat.
//
// known is the ledger's own time of the fact that came last: the capture, the
// start or the end of the last attempt.
func (p Policy) GraceEnd(started time.Time, ended bool, known time.Time) time.Time {
	from := known
	if deadline := started.Add(p.Timeout); !ended && deadline.After(from) {
		from = deadline
	}
	return from.Add(p.Grace)
}
