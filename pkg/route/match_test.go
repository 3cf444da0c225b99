package route_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestTheMostSpecificRouteDecides(t *testing.T) {
	table := load(t, `
routes:
- {name: rest, upstream: {url: "http://a"}}
- {name: rest-put, match: {methods: [PUT]}, upstream: {url: "http://a"}}
- {name: calls, match: {path: {prefix: /v1/calls}}, upstream: {url: "http://a"}}
- {name: calls-get, match: {path: {prefix: /v1/calls/}, methods: [GET]}, upstream: {url: "http://a"}}
- {name: v1, match: {path: {prefix: /v1}}, upstream: {url: "http://a"}}
- {name: exact, match: {path: {exact: /v1/calls/now}, methods: [POST, DELETE]}, upstream: {url: "http://a"}}
- {name: host, match: {hosts: [API.example.com., "[::1]"], path: {prefix: /v1}}, upstream: {url: "http://a"}}
- {name: host-port, match: {hosts: ["api.example.com:8443", "[::1]:81"]}, upstream: {url: "http://a"}}
- {name: wild, match: {hosts: ["*.example.com"]}, upstream: {url: "http://a"}}
- {name: wild-port, match: {hosts: ["*.example.com:8443"]}, upstream: {url: "http://a"}}
- {name: deep, match: {hosts: ["*.eu.example.com"], methods: [GET, POST]}, upstream: {url: "http://a"}}
- {name: umlaut, match: {path: {exact: "/%c3%a4/ü"}}, upstream: {url: "http://a"}}
- {name: slash, match: {path: {exact: "/calls/"}}, upstream: {url: "http://a"}}
- {name: doubled, match: {path: {exact: "//calls"}}, upstream: {url: "http://a"}}
`)
	for _, c := range []struct{ host, path, method, want string }{
		// Paths.
		{"x", "/", "GET", "rest"},
		{"x", "", "GET", "rest"},
		{"", "/v1", "POST", "v1"},
		{"x", "/v1/", "POST", "v1"},
		{"x", "/v1x", "POST", "rest"},
		{"x", "/V1", "POST", "rest"},
		{"x", "/v1/calls", "POST", "calls"},
		{"x", "/v1/calls/", "POST", "calls"},
		{"x", "/v1/calls/7", "POST", "calls"},
		{"x", "/v1/callsx", "POST", "v1"},
		{"x", "/v1/calls?now", "POST", "calls"},
		{"x", "/v1/calls/now?a=/v1", "POST", "exact"},
		{"x", "/v1/calls/now/", "POST", "calls"},
		{"x", "/calls/", "POST", "slash"},
		{"x", "/calls", "POST", "rest"},
		{"x", "//calls", "POST", "doubled"},
		{"x", "//v1/calls", "POST", "rest"},
		// Methods: a route that does not take one is passed over.
		{"x", "/v1/calls/now", "GET", "calls-get"},
		{"x", "/v1/calls/now", "PATCH", "calls"},
		{"x", "/v1/calls", "GET", "calls-get"},
		{"x", "/v2", "PUT", "rest-put"},
		{"x", "/v2", "put", "rest"},
		// The same path in another spelling.
		{"x", "/v1/%63alls", "POST", "calls"},
		{"x", "/v1/%43alls", "POST", "v1"},
		{"x", "/%76%31/calls/7", "POST", "calls"},
		{"x", "/v1/./calls", "POST", "calls"},
		{"x", "/v1/x/../calls", "POST", "calls"},
		{"x", "/v1/x/%2e%2E/calls", "POST", "calls"},
		{"x", "/../v1/calls", "POST", "calls"},
		{"x", "/v1/calls/..", "POST", "v1"},
		{"x", "/v1/calls/../..", "POST", "rest"},
		{"x", "/v1%2Fcalls", "POST", "rest"},
		{"x", "/v1/calls%2F7", "POST", "v1"},
		{"x", "/v1//calls", "POST", "v1"},
		{"x", "/v1/%zz/../calls", "POST", "calls"},
		{"x", "/%C3%a4/\xc3\xbc", "POST", "umlaut"},
		{"x", "/\xc3\xa4/%C3%BC", "POST", "umlaut"},
		// Hosts.
		{"api.example.com", "/v1", "POST", "host"},
		{"Api.Example.COM", "/v1", "POST", "host"},
		{"api.example.com.", "/v1", "POST", "host"},
		{"api.example.com:80", "/v1", "POST", "host"},
		{"api.example.com.:80", "/v1", "POST", "host"},
		{"api.example.com:8443", "/v1", "POST", "host-port"},
		{"api.example.com.:8443", "/v2", "POST", "host-port"},
		{"api.example.com", "/v2", "POST", "wild"},
		{"api.example.com:", "/v2", "POST", "wild"},
		{"b.example.com:8443", "/v2", "POST", "wild-port"},
		{"example.com", "/v2", "POST", "rest"},
		{".example.com", "/v2", "POST", "rest"},
		{"xexample.com", "/v2", "POST", "rest"},
		{"a.b.example.com", "/v1/calls", "POST", "wild"},
		{"a.eu.example.com:1", "/v1/calls", "POST", "deep"},
		{"a.eu.example.com", "/v1/calls", "PUT", "wild"},
		{"eu.example.com", "/v1/calls", "POST", "wild"},
		{"[::1]", "/v1", "POST", "host"},
		{"[::1]:80", "/v1", "POST", "host"},
		{"[::1]:81", "/v2", "POST", "host-port"},
		{"[::1", "/v2", "POST", "rest"},
		{"[::2]", "/v2", "POST", "rest"},
		{strings.Repeat("a.", 200) + "example.com", "/v2", "POST", "rest"},
		// Only routes for every path.
		{"x", "*", "OPTIONS", "rest"},
		{"a.example.com", "*", "OPTIONS", "wild"},
		{"api.example.com", "*", "OPTIONS", "wild"},
	} {
		got := table.Match(c.host, c.path, c.method)
		require.NotNil(t, got, "%+v", c)
		require.Equal(t, c.want, got.Name, "%+v", c)
		require.Same(t, got, table.ByName(c.want))
	}
	require.Nil(t, table.ByName("none"))
	require.Len(t, table.Routes(), 14)
	require.Equal(t, "rest", table.Routes()[0].Name)
}

func TestNoRoute(t *testing.T) {
	table := load(t, `routes: [{name: a, match: {hosts: [h], path: {exact: /a}, methods: [GET]}, upstream: {url: "http://a"}}]`)
	require.NotNil(t, table.Match("H:1", "/a", "GET"))
	require.Nil(t, table.Match("h", "/a", "POST"))
	require.Nil(t, table.Match("h", "/a/b", "GET"))
	require.Nil(t, table.Match("i", "/a", "GET"))
	require.Nil(t, table.Match("h", "*", "GET"))
}

func TestMatchingAllocatesNothing(t *testing.T) {
	every := load(t, `routes: [{name: a, upstream: {url: "http://a"}}]`)
	require.Zero(t, testing.AllocsPerRun(100, func() { every.Match("h", "/%61/../b", "GET") }))
	many := load(t, `
routes:
- {name: a, match: {hosts: ["*.eu.example.com", api.example.com], path: {prefix: /.well-known}}, upstream: {url: "http://a"}}
- {name: b, match: {path: {prefix: /b}, methods: [PUT]}, upstream: {url: "http://a"}}
`)
	for _, path := range []string{"/.well-known/x", "/b/%2F%C3%A4?x", "/"} {
		require.Zero(t, testing.AllocsPerRun(100, func() {
			many.Match("Some.API.eu.example.com.:8443", path, "PUT")
			many.Match("api.example.com", path, "PUT")
		}), path)
	}
}

// rule is a route as the naive matcher sees it.
type rule struct {
	name, host, exact, prefix string
	methods                   []string
}

// naive looks at every rule and keeps the one with the highest rank.
func naive(rules []rule, host, port, path, method string) string {
	best, bestRank := "", []int(nil)
	for _, r := range rules {
		rank := make([]int, 5)
		name, p, _ := strings.Cut(r.host, ":")
		suffix, wild := strings.CutPrefix(name, "*")
		switch {
		case p != "" && p != port:
			continue
		case r.host == "":
		case wild && strings.HasSuffix(host, suffix) && len(host) > len(suffix):
			rank[0], rank[1] = 1, 2*len(suffix)
		case name == host:
			rank[0] = 2
		default:
			continue
		}
		if p != "" {
			rank[1]++
		}
		switch {
		case r.exact != "":
			if r.exact != path {
				continue
			}
			rank[2] = 1
		case r.prefix != "" && r.prefix != "/":
			if !strings.HasPrefix(path+"/", r.prefix+"/") {
				continue
			}
			rank[3] = len(r.prefix)
		}
		if len(r.methods) > 0 {
			if !slices.Contains(r.methods, method) {
				continue
			}
			rank[4] = 1
		}
		if best == "" || slices.Compare(rank, bestRank) > 0 {
			best, bestRank = r.name, rank
		}
	}
	return best
}

// equal reports whether a request could find both rules equal.
func (r rule) equal(o rule) bool {
	every := func(prefix string) string { return strings.TrimSuffix(prefix, "/") }
	overlap := len(r.methods) == 0 && len(o.methods) == 0 ||
		slices.ContainsFunc(r.methods, func(m string) bool { return slices.Contains(o.methods, m) })
	return r.host == o.host && r.exact == o.exact && every(r.prefix) == every(o.prefix) && overlap
}

func (r rule) yaml() string {
	var b strings.Builder
	fmt.Fprintf(&b, "- name: %s\n  upstream: {url: \"http://a\"}\n  match:\n    {", r.name)
	if r.host != "" {
		fmt.Fprintf(&b, "hosts: [%q], ", r.host)
	}
	if r.exact != "" {
		fmt.Fprintf(&b, "path: {exact: %q}, ", r.exact)
	}
	if r.prefix != "" {
		fmt.Fprintf(&b, "path: {prefix: %q}, ", r.prefix)
	}
	if len(r.methods) > 0 {
		fmt.Fprintf(&b, "methods: [%s]", strings.Join(r.methods, ", "))
	}
	return b.String() + "}\n"
}

// TestMatchIsAsTheNaiveMatcherSays, and a table is made exactly when no two of
// its rules are equal.
func TestMatchIsAsTheNaiveMatcherSays(t *testing.T) {
	hosts := []string{"a.com", "b.a.com", "c.b.a.com", "d"}
	ruleHosts := append([]string{"", "", "a.com:81", "b.a.com:81", "*.a.com", "*.a.com:81", "*.b.a.com", "*.com"}, hosts...)
	element := rapid.SampledFrom([]string{"a", "b", "ab", ""})
	path := rapid.Custom(func(t *rapid.T) string {
		return "/" + strings.Join(rapid.SliceOfN(element, 0, 3).Draw(t, "elements"), "/")
	})
	methods := []string{"GET", "PUT", "POST"}
	file := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		var rules []rule
		equal := false
		for i := range rapid.IntRange(1, 8).Draw(rt, "rules") {
			r := rule{name: fmt.Sprintf("r%d", i), host: rapid.SampledFrom(ruleHosts).Draw(rt, "host")}
			switch p := path.Draw(rt, "path"); rapid.IntRange(0, 2).Draw(rt, "kind") {
			case 0:
				r.exact = p
			case 1:
				// One slash at the end says nothing, and several are refused.
				r.prefix = "/" + strings.Trim(p, "/")
			}
			r.methods = rapid.SliceOfNDistinct(rapid.SampledFrom(methods), 0, 2, rapid.ID).Draw(rt, "methods")
			equal = equal || slices.ContainsFunc(rules, r.equal)
			rules = append(rules, r)
		}
		var text strings.Builder
		text.WriteString("routes:\n")
		for _, r := range rules {
			text.WriteString(r.yaml())
		}
		table, err := loadText(file, text.String())
		if equal {
			require.ErrorContains(rt, err, "matches the same as the route in line")
			return
		}
		require.NoError(rt, err, text.String())
		for range 10 {
			host, port := rapid.SampledFrom(hosts).Draw(rt, "of"), rapid.SampledFrom([]string{"", "80", "81"}).Draw(rt, "port")
			p, m := path.Draw(rt, "to"), rapid.SampledFrom(append(methods, "HEAD")).Draw(rt, "with")
			authority := host
			if port != "" {
				authority += ":" + port
			}
			got := ""
			if r := table.Match(authority, p, m); r != nil {
				got = r.Name
			}
			require.Equal(rt, naive(rules, host, port, p, m), got, "%s %s%s\n%s", m, authority, p, text.String())
		}
	})
}

// TestSpellingsOfOnePath: whatever spelling a client chooses, the route is the
// same.
func TestSpellingsOfOnePath(t *testing.T) {
	table := load(t, `
routes:
- {name: target, match: {path: {exact: "/a.b/c~d/%20%2F/ü"}}, upstream: {url: "http://a"}}
- {name: rest, upstream: {url: "http://a"}}
`)
	rapid.Check(t, func(t *rapid.T) {
		var b strings.Builder
		for _, c := range []byte("/a.b/c~d/%20%2F/\xc3\xbc") {
			if c == '/' {
				b.WriteString(rapid.SampledFrom([]string{"/", "/", "/./", "/x/../", "/%2e/", "/x%2F/.%2E/", "/././"}).Draw(t, "slash"))
				continue
			}
			spellings := []string{string([]byte{c}), fmt.Sprintf("%%%02x", c), fmt.Sprintf("%%%02X", c)}
			if inside := strings.HasSuffix(b.String(), "%") || strings.HasSuffix(b.String(), "%2"); c == '%' || inside {
				spellings = spellings[:1] // of an encoding
				if inside && c == 'F' {
					spellings = []string{"f", "F"}
				}
			}
			b.WriteString(rapid.SampledFrom(spellings).Draw(t, "spelling"))
		}
		require.Equal(t, "target", table.Match("h", b.String(), "GET").Name, b.String())
	})
}
