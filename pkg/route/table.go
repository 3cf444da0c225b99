package route

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/holdfast-io/holdfast/pkg/service"
)

// Table finds the route of a request. It never changes, and is safe for
// concurrent use.
type Table struct {
	routes []*Route
	byName map[string]*Route
	only   *Route             // the one route there is, when it takes everything
	hosts  map[string][]entry // by host, or host:port
	below  map[string][]entry // by what follows the star of a wildcard
	any    []entry            // of routes without hosts
}

// entry is one way for a request to get to a route, once its host fits.
type entry struct {
	path  string // a prefix without its last slash, so that "/" is ""
	exact bool
	*Route
}

// newTable takes routes that are in order each for itself. The order of entries
// is that in which they are tried.
func newTable(routes []*Route) *Table {
	t := &Table{
		routes: routes, byName: make(map[string]*Route),
		hosts: make(map[string][]entry), below: make(map[string][]entry),
	}
	for _, r := range routes {
		t.byName[r.Name] = r
		e := entry{path: strings.TrimSuffix(r.Path.Prefix, "/"), Route: r}
		if r.Path.Exact != "" {
			e.path, e.exact = r.Path.Exact, true
		}
		for _, host := range r.Hosts {
			if suffix, ok := strings.CutPrefix(host, "*"); ok {
				t.below[suffix] = append(t.below[suffix], e)
			} else {
				t.hosts[host] = append(t.hosts[host], e)
			}
		}
		if len(r.Hosts) == 0 {
			t.any = append(t.any, e)
			if len(routes) == 1 && !e.exact && e.path == "" && len(r.Methods) == 0 {
				t.only = r
			}
		}
	}
	for _, entries := range t.hosts {
		slices.SortFunc(entries, compare)
	}
	for _, entries := range t.below {
		slices.SortFunc(entries, compare)
	}
	slices.SortFunc(t.any, compare)
	return t
}

// compare puts the more specific entry of one host first.
func compare(a, b entry) int {
	first := func(a, b bool) int {
		switch {
		case a == b:
			return 0
		case a:
			return -1
		}
		return 1
	}
	return cmp.Or(
		first(a.exact, b.exact),
		len(b.path)-len(a.path),
		first(len(a.Methods) > 0, len(b.Methods) > 0),
	)
}

// matches reports whether the entry is for the path, which is normalised.
func (e *entry) matches(path string) bool {
	if e.exact {
		return path == e.path
	}
	return e.path == "" || strings.HasPrefix(path, e.path) && (len(path) == len(e.path) || path[len(e.path)] == '/')
}

// overlap reports whether some method would find both routes equal.
func overlap(a, b service.Methods) bool {
	if len(a) == 0 || len(b) == 0 {
		return len(a) == len(b)
	}
	return slices.ContainsFunc(a, b.Has)
}

// Match gives the route of a request, nil when there is none.
//
// host is the value of the Host header field, with or without a port; its case
// does not matter, nor does one dot at the end of the name. path is the target
// in origin-form, from which a query is cut; "*" finds only routes for every
// path. Nothing is allocated unless the path has to be normalised.
func (t *Table) Match(host, path, method string) *Route {
	if t.only != nil {
		return t.only
	}
	if query := strings.IndexByte(path, '?'); query >= 0 {
		path = path[:query]
	}
	path = normalize(path)
	if len(t.hosts)+len(t.below) > 0 {
		if r := t.matchHost(host, path, method); r != nil {
			return r
		}
	}
	return find(t.any, path, method)
}

// maxHost bounds what is compared with the hosts of routes, which are no longer:
// a name and a port.
const maxHost = maxName + len(":65535")

// matchHost tries the routes with hosts.
func (t *Table) matchHost(host, path, method string) *Route {
	// With the dot that may end the name.
	if len(host) > maxHost+1 {
		return nil
	}
	var buf [maxHost + 1]byte
	whole := buf[:copy(buf[:], host)]
	for i, c := range whole {
		if 'A' <= c && c <= 'Z' {
			whole[i] = c | 0x20
		}
	}
	end := nameEnd(host)
	if end > 0 && whole[end-1] == '.' {
		whole = append(whole[:end-1], whole[end:]...)
		end--
	}
	name, ported := whole[:end], end < len(whole)
	if ported {
		if r := find(t.hosts[string(whole)], path, method); r != nil {
			return r
		}
	}
	if r := find(t.hosts[string(name)], path, method); r != nil {
		return r
	}
	if len(t.below) == 0 {
		return nil
	}
	for i := 1; i < len(name); i++ {
		if name[i] != '.' {
			continue
		}
		if ported {
			if r := find(t.below[string(whole[i:])], path, method); r != nil {
				return r
			}
		}
		if r := find(t.below[string(name[i:])], path, method); r != nil {
			return r
		}
	}
	return nil
}

// nameEnd gives where the port of a host begins, with its colon, or the length.
func nameEnd(host string) int {
	if strings.HasPrefix(host, "[") {
		if end := strings.IndexByte(host, ']'); end >= 0 {
			return end + 1
		}
		return len(host)
	}
	if colon := strings.LastIndexByte(host, ':'); colon >= 0 {
		return colon
	}
	return len(host)
}

func find(entries []entry, path, method string) *Route {
	for i := range entries {
		if e := &entries[i]; e.matches(path) && e.takes(method) {
			return e.Route
		}
	}
	return nil
}

// ByName gives the route with this name, nil when there is none.
func (t *Table) ByName(name string) *Route { return t.byName[name] }

// Routes gives the routes in the order of the file. The slice is the caller's,
// the routes are not.
func (t *Table) Routes() []*Route { return slices.Clone(t.routes) }

// maxName is how long the name of a host may be (RFC 1035 section 2.3.4).
const maxName = 253

// hostName brings a host of a file into the form in which hosts are compared.
// problem is empty, or says what is wrong with it.
func hostName(text string) (host, problem string) {
	host = strings.ToLower(text)
	end := nameEnd(host)
	name, port := host[:end], host[end:]
	if port != "" && (port[0] != ':' || !validPort(port[1:])) {
		return "", "has no port from 1 to 65535; write host or host:port"
	}
	name = strings.TrimSuffix(name, ".")
	labels := name
	if rest, ok := strings.CutPrefix(name, "*."); ok {
		labels = rest
	}
	switch inner, bracketed := strings.CutPrefix(name, "["); {
	case name == "*":
		return "", "is every host; leave hosts out to match them all"
	case len(name) > maxName:
		return "", "is longer than a host name may be, 253 bytes"
	case bracketed:
		inner, closed := strings.CutSuffix(inner, "]")
		addr, err := netip.ParseAddr(inner)
		if err != nil || !closed || !addr.Is6() || addr.Zone() != "" {
			return "", "is no IPv6 address in brackets"
		}
	case strings.Contains(labels, "*"):
		return "", "has a star that is not its first label; write for instance *.example.com"
	case strings.ContainsFunc(labels, func(c rune) bool { return c >= 0x80 }):
		return "", "has letters that are not ASCII; write the name in its xn-- form"
	case !validLabels(labels):
		return "", "is not a host; write for instance api.example.com, *.example.com or api.example.com:8443"
	}
	return name + port, ""
}

func validLabels(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, func(c rune) bool {
			return !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_')
		}) {
			return false
		}
	}
	return true
}

func validPort(text string) bool {
	n := 0
	for _, c := range []byte(text) {
		if c < '0' || c > '9' || len(text) > 5 {
			return false
		}
		n = n*10 + int(c-'0')
	}
	return n > 0 && n <= 65535 && text[0] != '0'
}
