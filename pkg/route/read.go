package route

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
)

// read is a route with what is asked of all routes together.
type read struct {
	*Route
	line int
	// nameLine is where the name stands, 0 without a good one.
	nameLine int
	// matched says that the conditions could be read.
	matched bool
}

func (r *reader) routes(n *yaml.Node) []*Route {
	list := target(n)
	switch {
	case list.Kind != yaml.SequenceNode:
		r.wrong(n.Line, "routes is %s; write a list, with a dash before each route", kind(n))
		return nil
	case len(list.Content) == 0:
		r.wrong(n.Line, "routes is an empty list; write at least one route")
		return nil
	case len(list.Content) > maxRoutes:
		r.wrong(n.Line, "there are %d routes; the most are %d", len(list.Content), maxRoutes)
		return nil
	}
	var all []read
	for _, item := range list.Content {
		if r.full() {
			return nil
		}
		all = append(all, r.route(item))
	}
	r.together(all)
	routes := make([]*Route, len(all))
	for i := range all {
		routes[i] = all[i].Route
	}
	return routes
}

// together finds names and conditions that several routes have.
func (r *reader) together(all []read) {
	names := make(map[string]int)
	conditions := make(map[condition][]read)
	for _, one := range all {
		if one.nameLine > 0 {
			if first, twice := names[one.Name]; twice {
				r.wrong(one.nameLine, "the name %s is that of the route in line %d, too; give each its own", one.Name, first)
			} else {
				names[one.Name] = one.nameLine
			}
		}
		if !one.matched {
			continue
		}
		hosts := one.Hosts
		if len(hosts) == 0 {
			hosts = []string{""}
		}
		for _, host := range hosts {
			c := condition{host: host, path: one.Path}
			if c.path.Prefix == "/" {
				c.path.Prefix = ""
			}
			for _, other := range conditions[c] {
				if overlap(one.Methods, other.Methods) {
					r.wrong(one.line, "matches the same as the route in line %d, %s; tell them apart by hosts, path or methods", other.line, c)
					break
				}
			}
			conditions[c] = append(conditions[c], one)
		}
	}
}

// condition is what a request must be like, but for its method.
type condition struct {
	host string // empty for every host
	path Path   // the zero value for every path
}

// String gives a condition for people.
func (c condition) String() string {
	on := ""
	if c.host != "" {
		on = " of the host " + c.host
	}
	switch {
	case c.path.Exact != "":
		return "the path " + c.path.Exact + on
	case c.path.Prefix != "":
		return "paths from " + c.path.Prefix + on
	}
	return "every path" + on
}

// The keys of a routes file.
var (
	routeKeys      = []string{"name", "match", "upstream", "capture", "completion", "on_failure", "order_by", "grace", "replay"}
	matchKeys      = []string{"hosts", "path", "methods"}
	pathKeys       = []string{"prefix", "exact"}
	upstreamKeys   = []string{"url", "timeout"}
	captureKeys    = []string{"mode", "methods", "max_body", "keep_answers"}
	completionKeys = []string{"by", "processed", "failed"}
	replayKeys     = []string{"set_headers", "health"}
	headerKeys     = []string{"file"}
)

func (r *reader) route(n *yaml.Node) read {
	route := &Route{
		Mode: Required, Captured: service.Methods{"POST", "PUT", "PATCH", "DELETE"},
		MaxBody: r.maxBody, Policy: capture.DefaultPolicy(),
	}
	one := read{Route: route, line: n.Line}
	fields := r.fields(n, "a route", routeKeys...)
	if fields == nil {
		return one
	}
	if name, ok := fields["name"]; !ok {
		r.wrong(n.Line, "the route has no name; write one of a-z, 0-9, _ and -, at most 32")
	} else if text, ok := r.text(name, "name"); ok {
		if capture.ValidRoute(text) {
			route.Name, one.nameLine = text, name.Line
		} else {
			r.wrong(name.Line, "the name %s is not allowed; write a-z, 0-9, _ and -, at most 32, and not _ alone", quoted(text))
		}
	}
	before := r.found
	if match, ok := fields["match"]; ok {
		r.match(match, route)
	}
	one.matched = r.found == before
	if upstream, ok := fields["upstream"]; !ok {
		r.wrong(n.Line, "the route has no upstream; write upstream: {url: http://…}")
	} else {
		r.upstream(upstream, route)
	}
	if c, ok := fields["capture"]; ok {
		r.capture(c, route)
	}
	if c, ok := fields["completion"]; ok {
		r.completion(c, route)
	}
	if f, ok := fields["on_failure"]; ok {
		route.Accept = r.choice(f, "on_failure", "passthrough", "accept") == "accept"
		if route.Accept && route.Mode != Required {
			r.wrong(f.Line, "on_failure is accept, but capture.mode is %s; only a stored request can be accepted, so capture it as required", route.Mode)
		}
	}
	if o, ok := fields["order_by"]; ok {
		r.orderBy(o, route)
	}
	if g, ok := fields["grace"]; ok {
		r.duration(g, "grace", 0, &route.Policy.Grace)
	}
	if replay, ok := fields["replay"]; ok {
		fields := r.fields(replay, "replay", replayKeys...)
		if set, ok := fields["set_headers"]; ok {
			r.setHeaders(set, route)
		}
		if health, ok := fields["health"]; ok {
			if text, ok := r.text(health, "replay.health"); ok {
				if problem := CheckHealth(text); problem != "" {
					r.wrong(health.Line, "replay.health: %s %s", quoted(text), problem)
				}
				route.Health = text
			}
		}
	}
	return one
}

func (r *reader) match(n *yaml.Node, route *Route) {
	fields := r.fields(n, "match", matchKeys...)
	if hosts, ok := fields["hosts"]; ok {
		r.list(hosts, "match.hosts", func(item *yaml.Node, text string) string {
			host, problem := hostName(text)
			if problem != "" {
				r.wrong(item.Line, "%s in match.hosts %s", quoted(text), problem)
				return ""
			}
			if !slices.Contains(route.Hosts, host) {
				route.Hosts = append(route.Hosts, host)
			}
			return host
		})
	}
	if p, ok := fields["path"]; ok {
		r.matchPath(p, route)
	}
	if methods, ok := fields["methods"]; ok {
		route.Methods = r.methods(methods, "match.methods")
		if route.Methods.Has("*") {
			route.Methods = nil
		}
	}
}

func (r *reader) matchPath(n *yaml.Node, route *Route) {
	fields := r.fields(n, "match.path", pathKeys...)
	prefix, hasPrefix := fields["prefix"]
	exact, hasExact := fields["exact"]
	switch {
	case fields == nil:
	case hasPrefix && hasExact:
		r.wrong(n.Line, "match.path has prefix and exact; write one of them")
	case hasPrefix:
		if route.Path.Prefix = r.pathOf(prefix, "match.path.prefix"); strings.HasSuffix(route.Path.Prefix, "//") {
			r.wrong(prefix.Line, "match.path.prefix ends in //, which no element does; write one / or none")
		} else if route.Path.Prefix != "/" {
			route.Path.Prefix = strings.TrimSuffix(route.Path.Prefix, "/")
		}
	case hasExact:
		route.Path.Exact = r.pathOf(exact, "match.path.exact")
	default:
		r.wrong(n.Line, "match.path is empty; write prefix or exact, or leave it out to match every path")
	}
}

// pathOf gives a path of the file, normalised.
func (r *reader) pathOf(n *yaml.Node, what string) string {
	text, ok := r.text(n, what)
	if !ok {
		return ""
	}
	problem := ""
	switch {
	case text[0] != '/':
		problem = "does not begin with /"
	case len(text) > maxPath:
		problem = fmt.Sprintf("is longer than %d bytes", maxPath)
	case strings.ContainsAny(text, "?#"):
		problem = "has a query or a fragment; only the path is matched"
	case strings.ContainsAny(text, "*{}"):
		problem = "has *, { or }, and there are no patterns; a prefix matches all that is below it"
	case strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' }):
		problem = "has a space or a control character; write it percent-encoded"
	default:
		if _, err := url.PathUnescape(text); err != nil {
			problem = "has a % that begins no percent-encoding; write %25 for the sign itself"
		}
	}
	if problem != "" {
		r.wrong(n.Line, "%s: %s %s", what, quoted(text), problem)
		return ""
	}
	return normalize(text)
}

// CheckHealth says what is wrong with a path as [Route.Health] takes it, nothing
// when it is right.
func CheckHealth(path string) (problem string) {
	switch {
	case !strings.HasPrefix(path, "/") || strings.HasPrefix(path, "//"):
		return "is not a path; write for instance /healthz"
	case len(path) > maxPath:
		return fmt.Sprintf("is longer than %d bytes", maxPath)
	case strings.Contains(path, "#"):
		return "has a fragment, which is not sent"
	case strings.ContainsFunc(path, func(c rune) bool { return c <= ' ' || c > '~' }):
		return "has what must be percent-encoded in a path"
	}
	if _, err := url.ParseRequestURI(path); err != nil {
		return "is not a path; a % that begins no percent-encoding is written %25"
	}
	return ""
}

func (r *reader) methods(n *yaml.Node, what string) service.Methods {
	var methods service.Methods
	r.list(n, what, func(item *yaml.Node, text string) string {
		upper := strings.ToUpper(text)
		switch known := []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}; {
		case !isToken(text):
			r.wrong(item.Line, "%s in %s is no method; write for instance POST, or \"*\" for all", quoted(text), what)
			return ""
		case upper != text && slices.Contains(known, upper):
			r.wrong(item.Line, "%s in %s is another method than %s; write %s", quoted(text), what, upper, upper)
			return ""
		}
		methods = append(methods, text)
		return text
	})
	return methods
}

func (r *reader) upstream(n *yaml.Node, route *Route) {
	fields := r.fields(n, "upstream", upstreamKeys...)
	if u, ok := fields["url"]; ok {
		if text, ok := r.text(u, "upstream.url"); ok {
			var parsed service.URL
			if err := parsed.UnmarshalText([]byte(text)); err != nil {
				r.wrong(u.Line, "upstream.url %v", err)
			} else if parsed.Path != "" && parsed.Path != "/" {
				r.wrong(u.Line, "upstream.url has a path, which is not allowed; requests keep the path that the client sent")
			} else {
				route.Upstream = &url.URL{Scheme: parsed.Scheme, Host: parsed.Host}
			}
		}
	} else if fields != nil {
		r.wrong(n.Line, "upstream.url is missing; write the API, for instance http://api:8080")
	}
	if timeout, ok := fields["timeout"]; ok {
		// The least is that of HOLDFAST_UPSTREAM_TIMEOUT.
		r.duration(timeout, "upstream.timeout", time.Millisecond, &route.Policy.Timeout)
	}
}

func (r *reader) capture(n *yaml.Node, route *Route) {
	fields := r.fields(n, "capture", captureKeys...)
	if mode, ok := fields["mode"]; ok {
		if m := r.choice(mode, "capture.mode", string(Required), string(BestEffort), string(Off)); m != "" {
			route.Mode = Mode(m)
		}
	}
	if methods, ok := fields["methods"]; ok {
		route.Captured = r.methods(methods, "capture.methods")
	}
	if most, ok := fields["max_body"]; ok {
		if size, ok := r.size(most, "capture.max_body"); ok && size < 1 {
			r.wrong(most.Line, "capture.max_body: %s is too small; the least is 1", quoted(target(most).Value))
		} else {
			route.MaxBody = int64(size)
		}
	}
	if most, ok := fields["keep_answers"]; ok {
		if size, ok := r.size(most, "capture.keep_answers"); ok && size > capture.MaxAnswer {
			r.wrong(most.Line, "capture.keep_answers: %s is too large; the most is %s", quoted(target(most).Value), service.ByteSize(capture.MaxAnswer))
		} else {
			route.KeepAnswers = int(size)
		}
	}
}

func (r *reader) completion(n *yaml.Node, route *Route) {
	fields := r.fields(n, "completion", completionKeys...)
	if by, ok := fields["by"]; ok {
		if b := r.choice(by, "completion.by", string(capture.ByResponse), string(capture.ByEvent)); b != "" {
			route.Policy.By = capture.CompletionBy(b)
		}
	}
	processed, hasProcessed := fields["processed"]
	failed, hasFailed := fields["failed"]
	var moved []string
	if hasProcessed {
		moved = r.statuses(processed, "completion.processed", &route.Policy.Processed, nil)
	}
	switch {
	case hasFailed && hasProcessed:
		r.statuses(failed, "completion.failed", &route.Policy.Failed, moved)
	case hasFailed:
		moved = r.statuses(failed, "completion.failed", &route.Policy.Failed, nil)
		route.Policy.Processed = without(route.Policy.Processed, moved)
	default:
		// A status that one list names is not one that the other has by default.
		route.Policy.Failed = without(route.Policy.Failed, moved)
	}
}

// statuses reads a list of statuses and classes, none of which may be in others.
func (r *reader) statuses(n *yaml.Node, what string, into *capture.StatusSet, others []string) []string {
	var list []string
	r.list(n, what, func(item *yaml.Node, text string) string {
		// A comma would make two of one.
		if err := capture.StatusSet(text).Validate(); err != nil || strings.Contains(text, ",") {
			r.wrong(item.Line, "%s in %s is no status; write one from 100 to 599, or a class from 1xx to 5xx", quoted(text), what)
			return ""
		}
		if slices.Contains(others, text) {
			r.wrong(item.Line, "%s is both processed and failed; keep one", text)
		}
		list = append(list, text)
		return text
	})
	*into = capture.StatusSet(strings.Join(list, ","))
	return list
}

// without takes statuses out of a set, where they stand as such.
func without(set capture.StatusSet, statuses []string) capture.StatusSet {
	kept := slices.DeleteFunc(strings.Split(string(set), ","), func(s string) bool { return slices.Contains(statuses, s) })
	return capture.StatusSet(strings.Join(kept, ","))
}

func (r *reader) orderBy(n *yaml.Node, route *Route) {
	text, ok := r.text(n, "order_by")
	if !ok {
		return
	}
	name, ok := strings.CutPrefix(text, "header:")
	if !ok || !isToken(name) {
		r.wrong(n.Line, "order_by: %s is not allowed; write header: and the name of a header, for instance \"header:X-Client-Id\"", quoted(text))
		return
	}
	route.OrderBy = http.CanonicalHeaderKey(name)
}

// unsettable are the names of header fields that are made for each request, or
// end at a hop (RFC 9110 section 7.6.1).
var unsettable = []string{
	"Connection", "Content-Length", "Expect", "Host", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
	"Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
}

func (r *reader) setHeaders(n *yaml.Node, route *Route) {
	fields := r.fields(n, "replay.set_headers")
	if len(fields) > maxList {
		r.wrong(n.Line, "replay.set_headers has %d headers; the most are %d", len(fields), maxList)
		return
	}
	names := make(map[string]string)
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		value := fields[name]
		canonical := http.CanonicalHeaderKey(name)
		switch other, twice := names[canonical]; {
		case !isToken(name):
			r.wrong(value.Line, "%s in replay.set_headers is no name of a header; write for instance Authorization", quoted(name))
		case capture.IsOwnHTTPHeader(name), slices.Contains(unsettable, canonical):
			r.wrong(value.Line, "%s in replay.set_headers cannot be set; Holdfast makes it for each request", name)
		case twice:
			r.wrong(value.Line, "%s and %s in replay.set_headers are one header; keep one", other, name)
		}
		names[canonical] = name
		file, ok := r.fields(value, "a header of replay.set_headers", headerKeys...)["file"]
		if !ok {
			if target(value).Kind == yaml.MappingNode {
				r.wrong(value.Line, "%s in replay.set_headers has no file; write {file: PATH}", quoted(name))
			}
			continue
		}
		if path, ok := r.text(file, "file"); ok {
			if !filepath.IsAbs(path) {
				path = filepath.Join(filepath.Dir(r.path), path)
			}
			route.SetHeaders = append(route.SetHeaders, SetHeader{Name: name, File: path})
		}
	}
}

// choice gives one of the allowed words, or nothing after reporting another.
func (r *reader) choice(n *yaml.Node, what string, allowed ...string) string {
	text, ok := r.text(n, what)
	if !ok {
		return ""
	}
	if !slices.Contains(allowed, text) {
		r.wrong(n.Line, "%s: %s is not allowed; write %s", what, quoted(text), alternatives(allowed))
		return ""
	}
	return text
}

func (r *reader) size(n *yaml.Node, what string) (size service.ByteSize, ok bool) {
	text, ok := r.text(n, what)
	if !ok {
		return 0, false
	}
	if err := size.UnmarshalText([]byte(text)); err != nil {
		r.wrong(n.Line, "%s: %s %v", what, quoted(text), err)
		return 0, false
	}
	return size, true
}

func (r *reader) duration(n *yaml.Node, what string, least time.Duration, into *time.Duration) {
	text, ok := r.text(n, what)
	if !ok {
		return
	}
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		r.wrong(n.Line, "%s: %s is not a duration; write for instance 30s or 5m", what, quoted(text))
	case d < least:
		r.wrong(n.Line, "%s: %s is too small; the least is %s", what, quoted(text), least)
	default:
		*into = d
	}
}

// isToken reports whether s is a token of RFC 9110, as methods and the names of
// header fields are.
func isToken(s string) bool {
	for _, c := range []byte(s) {
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0:
			return false
		}
	}
	return s != ""
}
