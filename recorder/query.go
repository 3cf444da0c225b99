package recorder

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

const (
	// How many items a page holds: when nothing is said, and at most.
	defaultLimit, maxLimit = 100, 1000
	// A message that was set aside may come with 64 KiB of data.
	defaultAsideLimit, maxAsideLimit = 20, 100
	// maxListed bounds the elements of a list with commas.
	maxListed = 100
	// maxGlob bounds a path's glob, which is held against every path.
	maxGlob = 4096
	// replayable is the pseudo state of what a replay would send.
	replayable = "replayable"
)

// query is the parameters of a request, each given once and known.
type query map[string]string

// parseQuery refuses parameters that are not allowed, given twice, or malformed.
// An empty one counts as not given.
func parseQuery(r *http.Request, allowed ...string) (query, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, invalid("query", "is malformed: %v", err)
	}
	q := make(query, len(values))
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	slices.Sort(names) // the same answer each time
	for _, name := range names {
		switch given := values[name]; {
		case !slices.Contains(allowed, name) && len(allowed) == 0:
			return nil, invalid(name, "is not a parameter of this path, which has none")
		case !slices.Contains(allowed, name):
			return nil, invalid(name, "is not a parameter of this path; allowed are %s", strings.Join(allowed, ", "))
		case len(given) > 1:
			return nil, invalid(name, "is given %d times; allowed is once, with commas between several values where it takes a list", len(given))
		case given[0] != "":
			q[name] = given[0]
		}
	}
	return q, nil
}

func (q query) get(name string) string { return q[name] }

// list splits a list with commas.
func (q query) list(name string) ([]string, error) {
	text := q[name]
	if text == "" {
		return nil, nil
	}
	list := strings.Split(text, ",")
	if len(list) > maxListed {
		return nil, invalid(name, "has %d values; allowed are at most %d", len(list), maxListed)
	}
	return list, nil
}

// limit is how many items the page shall hold at most.
func (q query) limit(def, most int) (int, error) {
	text := q["limit"]
	if text == "" {
		return def, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > most {
		return 0, invalid("limit", "%s is not allowed; allowed are whole numbers from 1 to %d", quoted(text), most)
	}
	return n, nil
}

// filter is what the parameters select.
func (q query) filter(now time.Time) (f ledger.Filter, err error) {
	states, err := q.list("state")
	if err != nil {
		return f, err
	}
	for _, s := range states {
		switch {
		case s == replayable && len(states) > 1:
			return f, invalid("state", "replayable cannot be combined with other states; it is failed, and received past its grace")
		case s == replayable:
			f.Replayable = true
		case slices.Contains(capture.States(), capture.State(s)):
			f.States = append(f.States, capture.State(s))
		default:
			return f, invalid("state", "%s is not allowed; allowed are %s, or %s alone", quoted(s), stateNames(), replayable)
		}
	}
	if f.Routes, err = q.list("route"); err != nil {
		return f, err
	}
	for _, route := range f.Routes {
		if !capture.ValidRoute(route) {
			return f, invalid("route", "%s is not the name of a route; allowed are a-z, 0-9, _ and -, at most 32", quoted(route))
		}
	}
	if f.Methods, err = q.list("method"); err != nil {
		return f, err
	}
	for _, method := range f.Methods {
		if !isMethod(method) {
			return f, invalid("method", "%s is not a method; allowed are tokens of at most 64 characters, such as POST", quoted(method))
		}
	}
	if f.Path = q["path"]; f.Path != "" {
		if len(f.Path) > maxGlob || !strings.ContainsRune("/*?", rune(f.Path[0])) {
			return f, invalid("path", "%s can match nothing; allowed is a pattern of at most %d bytes that begins with /, where * stands for any bytes but /, ** for any bytes, and ? for one byte but /", quoted(f.Path), maxGlob)
		}
	}
	if f.Statuses = capture.StatusSet(q["status"]); f.Statuses != "" {
		if _, err := q.list("status"); err != nil {
			return f, err
		}
		if err := f.Statuses.Validate(); err != nil {
			return f, invalid("status", "is not allowed: %v", err)
		}
	}
	if f.Since, err = q.time("since", now); err != nil {
		return f, err
	}
	if f.Until, err = q.time("until", now); err != nil {
		return f, err
	}
	if !f.Since.IsZero() && !f.Until.IsZero() && !f.Since.Before(f.Until) {
		return f, invalid("until", "is not after since; allowed are times after it")
	}
	return f, nil
}

// time reads a time, or a duration back from now.
func (q query) time(name string, now time.Time) (time.Time, error) {
	text := q[name]
	if text == "" {
		return time.Time{}, nil
	}
	// A plus in a query is a space, and a time zone has one.
	if t, err := time.Parse(time.RFC3339Nano, strings.Replace(text, " ", "+", 1)); err == nil && t.Year() >= 1970 && t.Year() <= 2261 {
		return t, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	return time.Time{}, invalid(name, "%s is not a time; allowed are RFC 3339, such as 2006-01-02T15:04:05Z, and a duration back from now, such as 90m", quoted(text))
}

func stateNames() string {
	var names []string
	for _, s := range capture.States() {
		names = append(names, string(s))
	}
	return strings.Join(names, ", ")
}

// isMethod says whether s is a token of RFC 9110.
func isMethod(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return s != "" && len(s) <= 64
}

// quoted shows a value in an error without letting it fill the page.
func quoted(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
