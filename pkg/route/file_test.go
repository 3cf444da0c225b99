package route_test

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/service"
)

// defaultMaxBody is what HOLDFAST_MAX_BODY_BYTES says in these tests.
const defaultMaxBody = 1000

// loadText loads routes from a file with this text in dir.
func loadText(dir, text string) (*route.Table, error) {
	path := filepath.Join(dir, "routes.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return nil, err
	}
	return route.Load(service.Routes{RoutesFile: path}, defaultMaxBody)
}

func load(t testing.TB, text string) *route.Table {
	t.Helper()
	table, err := loadText(t.TempDir(), text)
	require.NoError(t, err)
	return table
}

func TestTheExampleFile(t *testing.T) {
	const example = "../../deploy/examples/routes.yaml"
	table, err := route.Load(service.Routes{RoutesFile: example}, defaultMaxBody)
	require.NoError(t, err)
	require.Len(t, table.Routes(), 3)
	require.Equal(t, &route.Route{
		Name: "calls", Hosts: []string{"api.example.com", "*.api.example.com"}, Path: route.Path{Prefix: "/v1/calls"},
		Methods: service.Methods{"POST", "PUT"}, Upstream: &url.URL{Scheme: "http", Host: "api:8080"},
		Mode: route.Required, Captured: service.Methods{"POST", "PUT"}, MaxBody: 32 << 20, KeepAnswers: 64 << 10,
		Policy: capture.Policy{
			By: capture.ByEvent, Processed: "2xx,3xx", Failed: "408,425,429,5xx", Timeout: 30 * time.Second, Grace: time.Minute,
		},
		Accept: true, OrderBy: "X-Client-Id",
		SetHeaders: []route.SetHeader{{Name: "Authorization", File: "/run/secrets/token"}}, Health: "/healthz",
	}, table.Routes()[0])
	require.Equal(t, "calls", table.Match("eu.api.example.com", "/v1/calls/7", "PUT").Name)
	require.Equal(t, "health", table.Match("api.example.com", "/health", "GET").Name)
	require.Equal(t, "rest", table.Match("api.example.com", "/v1/calls/7", "GET").Name)

	// The comment promises every key.
	text, err := os.ReadFile(example)
	require.NoError(t, err)
	first, _, ok := strings.Cut(string(text), "\n- name: health")
	require.True(t, ok)
	for _, keys := range route.Keys() {
		for _, key := range keys {
			if key != "exact" { // which does not go with prefix
				require.Contains(t, first, key+":")
			}
		}
	}
	require.Contains(t, string(text), "exact:")
}

func TestWhatARouteSaysNothingAbout(t *testing.T) {
	for _, text := range []string{
		`routes: [{name: a, upstream: {url: "HTTPS://api.example:8443/"}}]`,
		"# a comment\n---\nroutes:\n- name: a\n  match: {}\n  upstream: {url: https://api.example:8443}\n  capture: {}\n  completion: {}\n  replay: {}\n",
	} {
		table := load(t, text)
		require.Equal(t, []*route.Route{{
			Name: "a", Upstream: &url.URL{Scheme: "https", Host: "api.example:8443"}, Mode: route.Required,
			Captured: service.Methods{"POST", "PUT", "PATCH", "DELETE"}, MaxBody: defaultMaxBody, Policy: capture.DefaultPolicy(),
		}}, table.Routes())
	}
}

func TestValues(t *testing.T) {
	dir := t.TempDir()
	table, err := loadText(dir, `
routes:
- &first
  name: first
  match: {path: {prefix: "/%61/../b/"}, methods: ["*"]}
  upstream: &api {url: "http://[::1]:81", timeout: 1ms}
  capture: {mode: best_effort, methods: ["*"], max_body: 5, keep_answers: 64KiB}
  completion: {processed: [2xx, 404, 408]}
  grace: 0
  replay: {health: "/healthz?deep=1", set_headers: {X-B: {file: b/c}, authorization: {file: ./a}}}
- <<: *first
  name: second
  match: {path: {exact: /b/}}
  completion: {failed: [3xx, 302, 5xx, 404]}
- <<: [{upstream: {<<: *api, timeout: 2s}}, *first]
  name: third
  match: {}
  capture: {mode: "off", max_body: 2GiB}
`)
	require.NoError(t, err)
	first, second, third := table.Routes()[0], table.Routes()[1], table.Routes()[2]
	require.Equal(t, route.Path{Prefix: "/b"}, first.Path)
	require.Nil(t, first.Methods)
	require.Equal(t, "[::1]:81", first.Upstream.Host)
	require.Equal(t, []int{64 << 10, 0}, []int{first.KeepAnswers, third.KeepAnswers})
	require.Equal(t, capture.Policy{
		By: capture.ByResponse, Processed: "2xx,404,408", Failed: "425,429,5xx", Timeout: time.Millisecond, Grace: 0,
	}, first.Policy)
	require.Equal(t, int64(5), first.MaxBody)
	require.True(t, first.Captures("BREW"))
	require.Equal(t, []route.SetHeader{{Name: "X-B", File: filepath.Join(dir, "b/c")}, {Name: "authorization", File: filepath.Join(dir, "a")}}, first.SetHeaders)

	require.Equal(t, "/healthz?deep=1", first.Health)

	require.Equal(t, route.Path{Exact: "/b/"}, second.Path)
	require.Equal(t, capture.StatusSet("2xx"), second.Policy.Processed)
	require.Equal(t, capture.StatusSet("3xx,302,5xx,404"), second.Policy.Failed)
	require.Equal(t, route.BestEffort, second.Mode)

	require.Equal(t, route.Path{}, third.Path)
	require.Equal(t, 2*time.Second, third.Policy.Timeout)
	require.Equal(t, int64(2<<30), third.MaxBody)
	require.False(t, third.Captures("POST"))
	for _, r := range table.Routes() {
		require.NoError(t, r.Policy.Validate())
	}
}

// health is a route of its own with a health path, in a line.
func health(n int, path string) string {
	return fmt.Sprintf("- {name: h%d, match: {path: {exact: /%d}}, %s, replay: {health: %q}}\n", n, n, up, path)
}

// up is the part of a route that is always in order.
const up = `upstream: {url: "http://a"}`

func TestEveryProblemHasItsLine(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string // line and a part of what is said, in order
	}{
		"empty":               {"", []string{"0 is empty; write routes:"}},
		"comments only":       {"# nothing\n", []string{"0 is empty"}},
		"null":                {"---\n", []string{"2 the file is empty; write a mapping with routes"}},
		"a list":              {"- a\n", []string{"1 the file is a list; write a mapping with routes"}},
		"no routes":           {"\nroute: []\n", []string{`2 "route" is no key of the file; did you mean routes? Allowed is routes`, "2 routes is missing"}},
		"routes is null":      {"\nroutes:\n", []string{"2 routes is empty; write a list"}},
		"routes is a mapping": {"routes: {a: b}\n", []string{"1 routes is a mapping"}},
		"routes is empty":     {"routes: []\n", []string{"1 routes is an empty list"}},
		"no YAML":             {"routes:\n- name: [a\n", []string{"2 is not YAML: did not find expected"}},
		"a tab":               {"routes:\n- name: a\n\tb: c\n", []string{"2 is not YAML: found a tab"}},
		"no anchor":           {"routes:\n- a\n- *b\n", []string{"3 is not YAML: unknown anchor 'b' referenced"}},
		"control character":   {"routes:\n- \x01", []string{"2 the control character U+0001 is not allowed; write UTF-8 text"}},
		"not UTF-8":           {"routes:\n\n- \xff", []string{"3 a byte is not UTF-8"}},
		"two documents":       {"routes: [{name: a, " + up + "}]\n---\nroutes: []\n", []string{"2 a second document begins here"}},
		"broken end":          {"routes: [{name: a, " + up + "}]\n---\n[\n", []string{"4 is not YAML"}},
		"elements": {"routes:\n- a\n- [b]\n-\n", []string{
			"2 a route is a single value; write a mapping with name, match", "3 a route is a list", "4 a route is empty",
		}},
		"nothing in a route": {"routes:\n- {}\n", []string{"2 the route has no name", "2 the route has no upstream"}},
		"keys": {"routes:\n- name: a\n  " + up + "\n  timeuot: 1s\n  on_failures: accept\n  name: b\n  {a: b}: c\n  match: {pth: /}\n", []string{
			`4 "timeuot" is no key of a route; allowed is name, match, upstream, capture, completion, on_failure, order_by, grace or replay`,
			`5 "on_failures" is no key of a route; did you mean on_failure?`,
			`6 "name" is there twice in a route, first in line 2`,
			`7 a key of a route is a mapping`,
			`8 "pth" is no key of match; did you mean path? Allowed is hosts, path or methods`,
		}},
		"names": {"routes:\n- {name: A, " + up + "}\n- {name: _, match: {path: {exact: /a}}, " + up + "}\n- {name: [a], match: {path: {exact: /b}}, " + up + "}\n" +
			"- {name: a, match: {path: {exact: /c}}, " + up + "}\n-\n  name: a\n  match: {path: {exact: /d}}\n  " + up + "\n- {name: , match: {path: {exact: /e}}, " + up + "}\n", []string{
			`2 the name "A" is not allowed; write a-z`, `3 the name "_" is not allowed`, `4 name is a list; write a single value`,
			"7 the name a is that of the route in line 5, too", "10 name is empty; write a single value",
		}},
		"hosts": {"routes:\n- name: a\n  match:\n    hosts:\n    - a b\n    - \"*\"\n    - a.*.b\n    - ä.de\n    - a:0\n    - a:99999\n    - \"[::1\"\n    - \"[1]\"\n    - a..b\n    - \"*.\"\n    - A.com\n    - a.com.\n    - \"[::1]80\"\n    - \"a:\"\n    - [b]\n    - ''\n  " + up + "\n", []string{
			`5 "a b" in match.hosts is not a host; write for instance`, `6 "*" in match.hosts is every host; leave hosts out`,
			`7 "a.*.b" in match.hosts has a star that is not its first label`, `8 "ä.de" in match.hosts has letters that are not ASCII`,
			`9 "a:0" in match.hosts has no port from 1 to 65535`, `10 "a:99999"`, `11 "[::1" in match.hosts is no IPv6 address`, `12 "[1]"`, `13 "a..b"`, `14 "*."`,
			`16 "a.com." is twice in match.hosts`, `17 "[::1]80" in match.hosts has no port`, `18 "a:" in match.hosts has no port`, `19 an element of match.hosts is a list`, `20 an element of match.hosts is empty`,
		}},
		"long host":   {"routes:\n- {name: a, match: {hosts: [" + strings.Repeat("abc.", 64) + "d]}, " + up + "}\n", []string{`2 "abc.abc.`}},
		"hosts, kind": {"routes:\n- {name: a, match: {hosts: a.com}, " + up + "}\n- {name: b, match: {hosts: []}, " + up + "}\n", []string{"2 match.hosts is a single value; write a list", "3 match.hosts is an empty list"}},
		"paths": {"routes:\n- {name: a, match: {path: /a}, " + up + "}\n- {name: b, match: {path: {}}, " + up + "}\n- {name: c, match: {path: {exact: /a, prefix: /b}}, " + up + "}\n" +
			"- {name: d, match: {path: {exact: a}}, " + up + "}\n- {name: e, match: {path: {prefix: \"/a?b\"}}, " + up + "}\n- {name: f, match: {path: {prefix: \"/a/*\"}}, " + up + "}\n" +
			"- {name: g, match: {path: {prefix: \"/a b\"}}, " + up + "}\n- {name: h, match: {path: {prefix: \"/%zz\"}}, " + up + "}\n- {name: i, match: {path: {prefix: \"/a//\"}}, " + up + "}\n" +
			"- {name: j, match: {path: {prefix: /" + strings.Repeat("a", 1024) + "}}, " + up + "}\n- {name: k, match: {path: {prefix: }}, " + up + "}\n", []string{
			"2 match.path is a single value; write a mapping with prefix or exact", "3 match.path is empty; write prefix or exact", "4 match.path has prefix and exact",
			`5 match.path.exact: "a" does not begin with /`, `6 match.path.prefix: "/a?b" has a query`, `7 match.path.prefix: "/a/*" has *, { or }`,
			`8 match.path.prefix: "/a b" has a space`, `9 match.path.prefix: "/%zz" has a %`, "10 match.path.prefix ends in //", "11 match.path.prefix: \"/aaa", "12 match.path.prefix is empty",
		}},
		"methods": {"routes:\n- {name: a, match: {methods: [post]}, " + up + "}\n- {name: b, match: {methods: [\"A B\", GET, GET]}, capture: {methods: POST}, " + up + "}\n", []string{
			`2 "post" in match.methods is another method than POST; write POST`, `3 "A B" in match.methods is no method`, `3 "GET" is twice in match.methods`, "3 capture.methods is a single value",
		}},
		"upstream": {"routes:\n- {name: a, upstream: http://a}\n- {name: b, match: {path: {exact: /b}}, upstream: {timeout: 0s}}\n- {name: c, match: {path: {exact: /c}}, upstream: {url: \"ftp://a\"}}\n" +
			"- {name: d, match: {path: {exact: /d}}, upstream: {url: \"http://u:secret@a\"}}\n- {name: e, match: {path: {exact: /e}}, upstream: {url: \"http://a/b\"}}\n- {name: f, match: {path: {exact: /f}}, upstream: {url: \"http://a?b\", timeout: 30}}\n" +
			"- {name: g, match: {path: {exact: /g}}, upstream: {url: \"http://%zz:secret@\", timeout: -1s}}\n", []string{
			"2 upstream is a single value; write a mapping with url or timeout", "3 upstream.url is missing", `3 upstream.timeout: "0s" is too small; the least is 1ms`,
			"4 upstream.url has a scheme that is not allowed", "5 upstream.url holds user info", "6 upstream.url has a path", "7 upstream.url has a query", `7 upstream.timeout: "30" is not a duration`,
			"8 upstream.url is not a URL", `8 upstream.timeout: "-1s" is too small`,
		}},
		"capture": {"routes:\n- name: a\n  " + up + "\n  capture:\n    mode: on\n    methods: []\n    max_body: 5 apples\n    keep_answers: 513KiB\n- name: b\n  match: {methods: [PUT]}\n  " + up + "\n  capture: {max_body: 0, mode: false}\n", []string{
			`5 capture.mode: "on" is not allowed; write required, best_effort or off`, "6 capture.methods is an empty list", `7 capture.max_body: "5 apples" is not a size`,
			`8 capture.keep_answers: "513KiB" is too large; the most is 512KiB`, `12 capture.mode: "false"`, `12 capture.max_body: "0" is too small; the least is 1`,
		}},
		"completion": {"routes:\n- name: a\n  " + up + "\n  completion:\n    by: both\n    processed: [2xx, 404, 408]\n    failed: [6xx, 99, \"4xx,5xx\", 408, 5xx, 5xx]\n  grace: -1s\n", []string{
			`5 completion.by: "both" is not allowed; write response or event`, `7 "6xx" in completion.failed is no status`, `7 "99" in`, `7 "4xx,5xx" in`, "7 408 is both processed and failed", `7 "5xx" is twice in completion.failed`,
			`8 grace: "-1s" is too small; the least is 0s`,
		}},
		"accept": {"routes:\n- name: a\n  " + up + "\n  on_failure: accept\n  capture: {mode: best_effort}\n- name: b\n  match: {methods: [GET]}\n  " + up + "\n  on_failure: maybe\n", []string{
			"4 on_failure is accept, but capture.mode is best_effort", `9 on_failure: "maybe" is not allowed; write passthrough or accept`,
		}},
		"order": {"routes:\n- {name: a, order_by: X-Client, " + up + "}\n- {name: b, match: {methods: [GET]}, order_by: \"header:a b\", " + up + "}\n", []string{
			`2 order_by: "X-Client" is not allowed`, `3 order_by: "header:a b"`,
		}},
		"headers": {"routes:\n- name: a\n  " + up + "\n  replay:\n    set_headers:\n      \"a b\": {file: x}\n      host: {file: x}\n      x_request_uuid: {file: x}\n      TE: {file: x}\n      Content-length: {file: x}\n" +
			"      X-A: {file: x}\n      x-a: {file: x}\n      X-B: {}\n      X-C: token\n      X-D: {file: }\n      X-E: {value: x}\n- name: b\n  match: {methods: [GET]}\n  " + up + "\n  replay: {set_header: {}}\n", []string{
			`6 "a b" in replay.set_headers is no name of a header`, "7 host in replay.set_headers cannot be set", "8 x_request_uuid in", "9 TE in", "10 Content-length in",
			"12 X-A and x-a in replay.set_headers are one header", `13 "X-B" in replay.set_headers has no file`, "14 a header of replay.set_headers is a single value; write a mapping with file", "15 file is empty",
			`16 "value" is no key of a header`, `16 "X-E" in replay.set_headers has no file`, `20 "set_header" is no key of replay; did you mean set_headers?`,
		}},
		"health": {"routes:\n" + health(1, "healthz") + health(2, "//a") + health(3, "/a#b") + health(4, "/a b") + health(5, "/a%2") + health(6, "/"+strings.Repeat("a", 1024)) + health(7, ""), []string{
			`2 replay.health: "healthz" is not a path`, "3 replay.health", "4 replay.health: \"/a#b\" has a fragment", "5 replay.health", "6 replay.health", "7 replay.health", "8 replay.health is empty",
		}},
		"tags": {"routes:\n- {name: !x a, " + up + "}\n- {name: !!binary YQ==, match: {methods: [GET]}, " + up + "}\n", []string{`2 name has the tag "!x"`, `3 name has the tag "!!binary"`}},
		"merges": {"routes:\n- &a\n  name: a\n  " + up + "\n  bogus: 1\n- {<<: *a, name: b, match: {methods: [GET]}}\n- {<<: [*a, 7], <<: x, name: c, match: {methods: [PUT]}}\n", []string{
			`5 "bogus" is no key of a route`, "7 << takes a mapping or a list of them; this is a single value",
		}},
		"equal": {"routes:\n- {name: a, " + up + "}\n- {name: b, match: {path: {prefix: /}}, " + up + "}\n- {name: c, match: {methods: [GET]}, " + up + "}\n- {name: d, match: {methods: [PUT, GET]}, " + up + "}\n" +
			"- {name: e, match: {hosts: [a.com, b.com], path: {prefix: /a/}}, " + up + "}\n- {name: f, match: {hosts: [c.com, B.COM.], path: {prefix: /%61}}, " + up + "}\n" +
			"- {name: g, match: {hosts: [b.com], path: {exact: /a}}, " + up + "}\n- {name: h, match: {hosts: [b.com], path: {exact: /b/../a}, methods: [\"*\"]}, " + up + "}\n", []string{
			"3 matches the same as the route in line 2, every path; tell them apart", "5 matches the same as the route in line 4, every path",
			"7 matches the same as the route in line 6, paths from /a of the host b.com", "9 matches the same as the route in line 8, the path /a of the host b.com",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := loadText(t.TempDir(), c.text)
			var wrong *route.FileError
			require.ErrorAs(t, err, &wrong)
			for i, want := range c.want {
				require.Less(t, i, len(wrong.Problems), "%s\n%v", want, err)
				got := wrong.Problems[i]
				require.True(t, strings.HasPrefix(fmt.Sprintf("%d %s", got.Line, got.What), want), "want %s\ngot  %d %s\n%v", want, got.Line, got.What, err)
			}
			require.Len(t, wrong.Problems, len(c.want), "%v", err)
			require.NotContains(t, err.Error(), "secret")
			for i, line := range wrong.Lines() {
				if n := wrong.Problems[i].Line; n > 0 {
					require.True(t, strings.HasPrefix(line, fmt.Sprintf("%s:%d: ", wrong.Path, n)), line)
				}
			}
		})
	}
}

func TestFilesThatAreNone(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	require.NoError(t, syscall.Mkfifo(pipe, 0o600))
	large := filepath.Join(dir, "large")
	require.NoError(t, os.WriteFile(large, []byte(strings.Repeat("#\n", 1<<19)+" "), 0o600))
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "none: cannot be read: no such file or directory",
		dir:                        ": is not a file; name one that holds routes",
		pipe:                       "pipe: is not a file; name one that holds routes",
		large:                      "large: is larger than 1MiB",
	} {
		_, err := route.Load(service.Routes{RoutesFile: path}, defaultMaxBody)
		require.ErrorContains(t, err, want)
		var wrong *route.FileError
		require.ErrorAs(t, err, &wrong)
		require.Len(t, wrong.Problems, 1)
	}
}

// TestFilesThatAreTooMuch: they end with few problems, and soon.
func TestFilesThatAreTooMuch(t *testing.T) {
	for name, c := range map[string]struct {
		text     string
		problems int
	}{
		"routes":  {"routes:\n" + strings.Repeat("- {name: a, "+up+"}\n", 1001), 1},
		"hosts":   {"routes:\n- {name: a, match: {hosts: [" + strings.Repeat("a.com, ", 101) + "]}, " + up + "}\n", 1},
		"wrong":   {"routes:\n" + strings.Repeat("- {}\n", 900), 100},
		"aliases": {"routes:\n- &a {" + strings.Repeat("x: &b {}, ", 1) + "<<: *a, name: a}\n" + strings.Repeat("- *a\n", 900), 900},
		"deep":    {"routes: " + strings.Repeat("[", 5000) + strings.Repeat("]", 5000), 1},
		"keys":    {"routes:\n- &a\n" + keys(20000) + strings.Repeat("- *a\n", 900), 100},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := loadText(t.TempDir(), c.text)
			var wrong *route.FileError
			require.ErrorAs(t, err, &wrong)
			require.LessOrEqual(t, len(wrong.Problems), c.problems)
		})
	}
}

func keys(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "  k%d: 1\n", i)
	}
	return b.String()
}

func TestTheDefaultRoute(t *testing.T) {
	var settings struct {
		service.Common
		service.Routes
	}
	require.NoError(t, service.Defaults(&settings, false))
	s := settings.Routes
	require.Equal(t, "HOLDFAST_UPSTREAM_URL", route.Check(s, defaultMaxBody)[0].Name)
	require.NoError(t, s.UpstreamURL.UnmarshalText([]byte("http://api:8080/")))
	s.OnFailure, s.OrderBy, s.Completion, s.Grace = "accept", "header:x-client", "event", time.Hour
	require.Empty(t, route.Check(s, defaultMaxBody))
	table, err := route.Load(s, defaultMaxBody)
	require.NoError(t, err)
	policy := capture.DefaultPolicy()
	policy.By, policy.Grace = capture.ByEvent, time.Hour
	require.Equal(t, &route.Route{
		Name: "default", Upstream: &url.URL{Scheme: "http", Host: "api:8080"}, Mode: route.Required,
		Captured: service.Methods{"POST", "PUT", "PATCH", "DELETE"}, MaxBody: defaultMaxBody, Policy: policy, Accept: true, OrderBy: "X-Client",
	}, table.Match("anything", "*", "OPTIONS"))

	s.UpstreamURL.Path, s.Capture = "/base", "off"
	problems := route.Check(s, defaultMaxBody)
	require.Len(t, problems, 2)
	require.Equal(t, "HOLDFAST_ON_FAILURE", problems[0].Name)
	require.Equal(t, service.Invalid("UPSTREAM_URL", "the path /base is not allowed; requests keep the path that the client sent"), problems[1])
	_, err = route.Load(s, defaultMaxBody)
	require.ErrorContains(t, err, "HOLDFAST_UPSTREAM_URL: the path /base")

	// A file replaces it, whatever it says, and each problem is a setting's.
	s.RoutesFile = filepath.Join(t.TempDir(), "routes.yaml")
	require.NoError(t, os.WriteFile(s.RoutesFile, []byte("routes:\n- {}\n"), 0o600))
	problems = route.Check(s, defaultMaxBody)
	require.Len(t, problems, 2)
	for _, p := range problems {
		require.Equal(t, "HOLDFAST_ROUTES_FILE", p.Name)
		require.True(t, strings.HasPrefix(p.Reason, s.RoutesFile+":2: the route has no "), p.Reason)
	}
}

// FuzzLoad: whatever the file holds, there is a table or problems, and what is
// in a table is in order.
func FuzzLoad(f *testing.F) {
	example, err := os.ReadFile("../../deploy/examples/routes.yaml")
	require.NoError(f, err)
	f.Add(example)
	for _, text := range []string{
		"routes: [{name: a, " + up + "}]", "routes:\n- &a {<<: *a, name: b}\n- <<: [*a, *a]", "a: &b [*b]", "- ? [\n: }", "%YAML 1.2\n---\n...\n---\n",
		"routes:\n- {name: a, " + up + ", match: {hosts: [\"*.a\", \"[::1]:1\"], path: {prefix: \"/%61/..//b/\"}}, completion: {processed: [200], failed: [2xx]}}",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		table, err := route.Parse(data, defaultMaxBody)
		if err != nil {
			var wrong *route.FileError
			require.ErrorAs(t, err, &wrong)
			require.NotEmpty(t, wrong.Problems)
			lines := strings.Count(string(data), "\n") + strings.Count(string(data), "\r") + strings.Count(string(data), "\u2028") +
				strings.Count(string(data), "\u2029") + strings.Count(string(data), "\u0085") + 1
			for _, p := range wrong.Problems {
				require.NotEmpty(t, p.What)
				require.LessOrEqual(t, p.Line, lines+1)
			}
			return
		}
		require.NotEmpty(t, table.Routes())
		for _, r := range table.Routes() {
			require.True(t, capture.ValidRoute(r.Name))
			require.Same(t, r, table.ByName(r.Name))
			require.NoError(t, r.Policy.Validate())
			again, err := capture.ParsePolicy(r.Policy.String())
			require.NoError(t, err)
			require.Equal(t, r.Policy, again)
			require.NotEmpty(t, r.Upstream.Host)
			require.Positive(t, r.MaxBody)
			require.False(t, r.Accept && r.Mode != route.Required)
			// Each route is found by what it asks for, or a route that asks for more.
			host, method := "", "GET"
			if len(r.Hosts) > 0 {
				host = strings.Replace(r.Hosts[0], "*", "a", 1)
			}
			if len(r.Methods) > 0 {
				method = r.Methods[0]
			}
			require.NotNil(t, table.Match(host, r.Path.Exact+r.Path.Prefix, method), r.Name)
		}
	})
}
