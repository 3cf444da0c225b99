package replayer_test

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/replayer"
)

// routesFile writes a routes file of names and URLs, and gives its setting.
func routesFile(t *testing.T, namesAndURLs ...string) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("routes:\n")
	for i := 0; i < len(namesAndURLs); i += 2 {
		name := namesAndURLs[i]
		fmt.Fprintf(&b, "- {name: %s, match: {path: {prefix: /%s}}, upstream: {url: %q}}\n", name, name, namesAndURLs[i+1])
	}
	return writeRoutes(t, b.String())
}

func writeRoutes(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "routes.yaml")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return "HOLDFAST_ROUTES_FILE=" + path
}

// routesTo leads routes to APIs: names and URLs in turn.
func routesTo(t *testing.T, namesAndURLs ...string) *replayer.Routes {
	t.Helper()
	var routes []*route.Route
	for i := 0; i < len(namesAndURLs); i += 2 {
		u, err := url.Parse(namesAndURLs[i+1])
		require.NoError(t, err)
		routes = append(routes, &route.Route{Name: namesAndURLs[i], Upstream: u})
	}
	rs, err := replayer.NewRoutes(replayer.RoutesOptions{Routes: routes, PreserveHost: true, MaxConns: 64})
	require.NoError(t, err)
	t.Cleanup(rs.Close)
	return rs
}

// mixed gives n requests of each route, in turn.
func mixed(n int, routes ...string) []request {
	var all []request
	for range n {
		for _, name := range routes {
			all = append(all, request{route: name, target: "/" + name})
		}
	}
	return all
}

// targets counts what arrived by target.
func (a *api) targets() map[string]int {
	n := make(map[string]int)
	for _, one := range a.seen() {
		n[one.target]++
	}
	return n
}

func TestEachRouteHasItsAPI(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	b.capture(t, mixed(20, "calls", "mails", "more")...)
	first, second := newAPI(t, nil), newAPI(t, nil)
	p := command(t, b, n.server.ClientURL(), "http://127.0.0.1:1", "run", "--output", "json")
	p.Env = append(p.Env, routesFile(t, "calls", first.URL, "mails", second.URL, "more", first.URL), "HOLDFAST_PRESERVE_HOST=false")
	require.Equal(t, 0, p.code(t), p.stderr.String())
	require.Equal(t, int64(60), p.report(t).Processed)
	require.Equal(t, map[string]int{"/calls": 20, "/more": 20}, first.targets())
	require.Equal(t, map[string]int{"/mails": 20}, second.targets())
}

func TestTheHostOfARoute(t *testing.T) {
	for setting, want := range map[string]func(a *api) string{
		"true":  func(*api) string { return "api.example" },
		"false": func(a *api) string { return strings.TrimPrefix(a.URL, "http://") },
	} {
		b, n := newBooks(t), newBroker(t)
		b.capture(t, mixed(1, "calls")...)
		var got string
		a := newAPI(t, func(_ http.ResponseWriter, r *http.Request, _ int) { got = r.Host })
		p := command(t, b, n.server.ClientURL(), "", "run")
		p.Env = append(p.Env, routesFile(t, "calls", a.URL), "HOLDFAST_PRESERVE_HOST="+setting)
		require.Equal(t, 0, p.code(t), p.stderr.String())
		require.Equal(t, want(a), got)
	}
}

// TestARouteThatIsGone: its requests stay as they were, and are reported; the
// others are sent.
func TestARouteThatIsGone(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	ids := b.capture(t, mixed(150, "gone", "calls")...) // more than a page
	a := newAPI(t, nil)
	env := routesFile(t, "calls", a.URL)
	p := command(t, b, n.server.ClientURL(), "", "run", "--output", "json")
	p.Env = append(p.Env, env)
	require.Equal(t, 3, p.code(t), p.stderr.String())
	report := p.report(t)
	require.Equal(t, replayer.EndFinished, report.End)
	require.Equal(t, ledger.RunCounts{Sent: 150, Processed: 150}, report.RunCounts)
	require.Equal(t, map[string]int64{"gone": 150}, report.Unrouted)
	require.Equal(t, int64(150), report.Left.Replayable)
	require.Equal(t, map[string]int{"/calls": 150}, a.targets())
	require.Contains(t, report.Next[0], "put the routes that are gone back")
	require.Len(t, report.Next, 1, "there are no failures to mend")
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, capture.StateFailed, d.State)
	require.Equal(t, 1, d.Attempts, "no attempt was burnt")

	// A limit is of what can be sent, and does not hide them.
	p = command(t, b, n.server.ClientURL(), "", "run", "--limit", "5")
	p.Env = append(p.Env, env)
	require.Equal(t, 3, p.code(t), p.stderr.String())
	require.Contains(t, p.stdout.String(), "no route   gone 150 (left alone)")
	require.Contains(t, p.stderr.String(), "route is gone")

	// Back again.
	p = command(t, b, n.server.ClientURL(), "", "run", "--output", "json")
	p.Env = append(p.Env, routesFile(t, "calls", a.URL, "gone", a.URL))
	require.Equal(t, 0, p.code(t), p.stderr.String())
	require.Empty(t, p.report(t).Unrouted)
	require.Equal(t, map[string]int{"/calls": 150, "/gone": 150}, a.targets())
}

// TestWithoutAFileThereIsTheDefaultRouteAlone: a request is never sent to an API
// that is not its route's.
func TestWithoutAFileThereIsTheDefaultRouteAlone(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	b.capture(t, mixed(1, capture.DefaultRoute, "calls")...)
	a, other := newAPI(t, nil), newAPI(t, nil)
	p := command(t, b, n.server.ClientURL(), a.URL, "run", "--output", "json")
	require.Equal(t, 3, p.code(t), p.stderr.String())
	require.Equal(t, map[string]int64{"calls": 1}, p.report(t).Unrouted)
	require.Equal(t, map[string]int{"/default": 1}, a.targets())

	// --upstream takes all of them, and no header of a route's.
	b.capture(t, mixed(1, capture.DefaultRoute)...)
	p = command(t, b, n.server.ClientURL(), a.URL, "run", "--output", "json", "--upstream", other.URL)
	p.Env = append(p.Env, writeRoutes(t, "routes: [{name: default, upstream: {url: \"http://127.0.0.1:1\"}, replay: {set_headers: {Authorization: {file: none}}}}]"))
	require.Equal(t, 3, p.code(t), "it answers otherwise: %s", p.stderr.String())
	require.Equal(t, map[string]int{"/default": 1, "/calls": 1}, other.targets())
	require.Len(t, a.seen(), 1)
}

// TestAHeaderIsAsFreshAsTheRun: its file is read when a run begins, and the value
// replaces every spelling of what was captured.
func TestAHeaderIsAsFreshAsTheRun(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	token := filepath.Join(t.TempDir(), "token")
	a := newAPI(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		if r.Header.Get("Authorization") != "Bearer new" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	env := writeRoutes(t, fmt.Sprintf(`
routes:
- {name: calls, match: {path: {prefix: /calls}}, upstream: {url: %q}, replay: {set_headers: {Authorization: {file: %q}, X-Api-Key: {file: key}}}}
- {name: plain, upstream: {url: %q}}
`, a.URL, token, a.URL))
	key := filepath.Join(filepath.Dir(strings.TrimPrefix(env, "HOLDFAST_ROUTES_FILE=")), "key")
	require.NoError(t, os.WriteFile(key, []byte("\tk 1 \r\n"), 0o600))
	stale := "authorization: Bearer captured\r\nX_API-KEY: a\r\nX-Kept: b\r\nx-api-key: c\r\n"
	b.capture(t, request{route: "calls", target: "/calls", headers: stale})
	run := func(value string) replayer.Report {
		require.NoError(t, os.WriteFile(token, []byte(value), 0o600))
		p := command(t, b, n.server.ClientURL(), "", "run", "--max-attempts", "1", "--output", "json")
		p.Env = append(p.Env, env)
		_ = p.code(t)
		require.NotContains(t, p.stdout.String()+p.stderr.String(), "Bearer", "a token is in no report and no log")
		return p.report(t)
	}
	require.Equal(t, int64(1), run("Bearer old").Failed)
	require.Equal(t, int64(1), run("Bearer new\n").Processed)
	seen := a.seen()
	require.Len(t, seen, 2)
	require.Equal(t, []string{"Bearer old"}, seen[0].header["Authorization"])
	require.Equal(t, []string{"Bearer new"}, seen[1].header["Authorization"])
	require.Equal(t, []string{"k 1"}, seen[1].header["X-Api-Key"])
	require.Equal(t, []string{"b"}, seen[1].header["X-Kept"])
	require.NotContains(t, seen[1].header, "X_api-Key")

	// Another route's requests are as they were captured.
	b.capture(t, request{route: "plain", target: "/plain", headers: stale})
	run("Bearer new")
	require.Equal(t, []string{"Bearer captured"}, a.seen()[2].header["Authorization"])
}

// TestAHeaderThatCannotBeRead ends the run before anything of its route is sent,
// and is in nobody's way where nothing of its route is to be sent.
func TestAHeaderThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	for content, want := range map[string]string{
		"missing":                  "no such file or directory",
		"":                         "the file is empty",
		" \n":                      "the file is empty",
		"a\nb":                     "a control character, or more than one line",
		"a\x00":                    "a control character",
		strings.Repeat("a", 70000): "larger than 64KiB",
	} {
		token := filepath.Join(dir, "token")
		if content == "missing" {
			token = filepath.Join(dir, "none")
		} else {
			require.NoError(t, os.WriteFile(token, []byte(content), 0o600))
		}
		a := newAPI(t, nil)
		u, err := url.Parse(a.URL)
		require.NoError(t, err)
		rs, err := replayer.NewRoutes(replayer.RoutesOptions{PreserveHost: true, MaxConns: 4, Routes: []*route.Route{
			{Name: "calls", Upstream: u, SetHeaders: []route.SetHeader{{Name: "Authorization", File: token}}},
			{Name: "plain", Upstream: u},
		}})
		require.NoError(t, err)
		defer rs.Close()

		b := newBooks(t)
		b.capture(t, mixed(1, "plain")...)
		o := options(t, b, a.URL)
		o.Upstreams = rs
		require.Equal(t, replayer.ExitOK, mustRun(t, o).ExitCode)
		b.capture(t, mixed(1, "plain", "calls")...)
		o.Clock = newClock()
		report := mustRun(t, o)
		require.Equal(t, replayer.ExitFailed, report.ExitCode)
		require.Contains(t, report.Reason, "route calls: set header Authorization from "+token+": ")
		require.Contains(t, report.Reason, want)
		require.Len(t, a.seen(), 1)
	}
}

// TestAnAPIThatIsAwayHoldsUpNoOther: what is for the others is sent first; then
// the run waits, and goes on when the API is back.
func TestAnAPIThatIsAwayHoldsUpNoOther(t *testing.T) {
	b := newBooks(t)
	b.capture(t, mixed(300, "away", "well")...)
	well := newAPI(t, nil)
	at := newPort(t)
	back := &api{}
	server := &http.Server{Handler: back.handler(nil)}
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	served := make(chan error, 1)
	c := newClock()
	sleeps := 0
	c.each = func(time.Duration) {
		// Asleep while something else could be sent?
		if len(well.seen()) < 300 {
			return
		}
		if sleeps++; sleeps == 5 {
			listener, err := at.listen()
			must(err)
			go func() { served <- server.Serve(listener) }()
		}
	}
	o := options(t, b, well.URL)
	o.Upstreams, o.Clock = routesTo(t, "away", "http://"+at.addr, "well", well.URL), c
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, report.Reason)
	require.Equal(t, ledger.RunCounts{Sent: 600, Processed: 600}, report.RunCounts, "no attempt was burnt")
	require.Equal(t, map[string]int{"/well": 300}, well.targets())
	require.Equal(t, map[string]int{"/away": 300}, back.targets())
	require.Equal(t, time.Second, c.slept()[0], "the first wait was that between passes")
	require.NoError(t, server.Close())
	require.ErrorIs(t, <-served, http.ErrServerClosed)
}

// TestAnAPIThatStaysAway ends the run as paused, with its name, when all others
// have their requests.
func TestAnAPIThatStaysAway(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, mixed(30, "away", "well", "busy")...)
	well := newAPI(t, nil)
	busy := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	at := newPort(t)
	o := options(t, b, well.URL)
	o.Upstreams, o.Concurrency = routesTo(t, "away", "http://"+at.addr, "well", well.URL, "busy", busy.URL), 1
	report := mustRun(t, o)
	require.Equal(t, replayer.EndPaused, report.End)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.Contains(t, report.Reason, at.addr+": the API could not be reached for 5m0s")
	require.Contains(t, report.Reason, strings.TrimPrefix(busy.URL, "http://")+": the API asks to wait 1h0m0s, --pause-limit is 5m0s")
	require.Equal(t, map[string]int{"/well": 30}, well.targets())
	require.Equal(t, map[string]int{"/busy": 1}, busy.targets(), "nobody was asked twice")
	d, err := b.Get(context.Background(), ids[0])
	require.NoError(t, err)
	require.Equal(t, 1, d.Attempts)
}

// TestAnAPIThatAsksToWaitOften is sent to again as soon as it allows, though
// there are others.
func TestAnAPIThatAsksToWaitOften(t *testing.T) {
	b := newBooks(t)
	b.capture(t, mixed(400, "busy", "well")...)
	well := newAPI(t, nil)
	var mu sync.Mutex
	asked := 0
	busy := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		mu.Lock()
		defer mu.Unlock()
		if asked++; asked%20 == 0 {
			w.Header().Set("Retry-After", "2")
			w.WriteHeader(http.StatusTooManyRequests)
		}
	})
	c := newClock()
	o := options(t, b, well.URL)
	o.Upstreams, o.Clock, o.MaxAttempts = routesTo(t, "busy", busy.URL, "well", well.URL), c, 100
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, report.Reason)
	require.Equal(t, int64(800), report.Processed)
	total := time.Duration(0)
	for _, d := range c.slept() {
		total += d
	}
	// It asked some twenty times. With the delays between passes of requests that
	// fail it would be ten minutes.
	require.Less(t, total, 2*time.Minute)
}

// TestAnAPIThatComesBackDuringAPass is seen to be back before all others have
// their requests.
func TestAnAPIThatComesBackDuringAPass(t *testing.T) {
	b := newBooks(t)
	b.capture(t, mixed(600, "away", "well")...)
	at := newPort(t)
	back := &api{}
	server := &http.Server{Handler: back.handler(nil)}
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	served := make(chan error, 1)
	var before atomic.Int64
	well := newAPI(t, nil)
	well.Config.Handler = well.handler(func(http.ResponseWriter, *http.Request, int) {
		if len(well.seen()) == 600 {
			before.Store(int64(len(back.seen())))
		}
	})
	c := newClock()
	var passed time.Duration
	c.each = func(d time.Duration) {
		if passed < 10*time.Second && passed+d >= 10*time.Second {
			listener, err := at.listen()
			must(err)
			go func() { served <- server.Serve(listener) }()
		}
		passed += d
	}
	o := options(t, b, well.URL)
	o.Upstreams, o.Clock, o.Rate = routesTo(t, "away", "http://"+at.addr, "well", well.URL), c, 10
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, report.Reason)
	require.Equal(t, int64(1200), report.Processed)
	require.Positive(t, before.Load())
	require.NoError(t, server.Close())
	require.ErrorIs(t, <-served, http.ErrServerClosed)
}

func TestCheckConfigReadsTheRoutes(t *testing.T) {
	b := newBooks(t)
	p := command(t, b, nowhere, "", "--check-config")
	p.Env = append(p.Env, "HOLDFAST_ROUTES_FILE=../deploy/examples/routes.yaml")
	require.Equal(t, 0, p.code(t), p.stderr.String())
	p = command(t, b, nowhere, "", "--check-config")
	p.Env = append(p.Env, writeRoutes(t, "routes:\n- name: A\n  upstream: {url: http://u:secret@a}\n  gracee: 1m\n"), "HOLDFAST_LOG_LEVEL=loud")
	require.Equal(t, 2, p.code(t))
	for _, want := range []string{
		`routes.yaml:2: the name "A" is not allowed`, "routes.yaml:3: upstream.url holds user info", `routes.yaml:4: "gracee" is no key of a route; did you mean grace?`,
		"HOLDFAST_LOG_LEVEL",
	} {
		require.Contains(t, p.stderr.String(), want)
	}
	require.Equal(t, 3, strings.Count(p.stderr.String(), "HOLDFAST_ROUTES_FILE: "))
	require.NotContains(t, p.stderr.String(), "secret")
	p = command(t, b, nowhere, "", "run")
	p.Env = append(p.Env, "HOLDFAST_ROUTES_FILE="+t.TempDir()+"/none")
	require.Equal(t, 2, p.code(t))
	require.Contains(t, p.stderr.String(), "none: cannot be read: no such file or directory")
}
