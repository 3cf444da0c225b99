package replayer_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/replayer"
)

// names is a resolver whose answers a test can change.
type names struct {
	mu sync.Mutex
	of map[string][]string
}

func (n *names) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	texts, ok := n.of[host]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	var addrs []netip.Addr
	for _, text := range texts {
		addrs = append(addrs, netip.MustParseAddr(text))
	}
	return addrs, nil
}

func (n *names) set(host string, addrs ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(addrs) == 0 {
		delete(n.of, host)
		return
	}
	n.of[host] = addrs
}

func urlOf(t *testing.T, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	require.NoError(t, err)
	return u
}

func newGuard(t *testing.T, resolver replayer.Resolver, production ...string) *replayer.Guard {
	t.Helper()
	var urls []*url.URL
	for _, one := range production {
		urls = append(urls, urlOf(t, one))
	}
	g, err := replayer.NewGuard(urls, resolver, nil)
	require.NoError(t, err)
	return g
}

// ownAddress is an address of this machine that is not a loopback one.
func ownAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, a := range addrs {
		if p := netip.MustParsePrefix(a.String()); p.Addr().Is4() && !p.Addr().IsLoopback() {
			return p.Addr().String()
		}
	}
	return "127.0.0.2" // of a machine without a network
}

func TestTheGuardKnowsProductionByEveryNameAndAddress(t *testing.T) {
	resolver := &names{of: map[string][]string{
		"api.example": {"203.0.113.1", "2001:db8::1"}, "alias.example": {"203.0.113.9", "203.0.113.1"}, "six.example": {"2001:db8::1"},
		"test.example": {"203.0.113.2"}, "mine.example": {"127.0.0.1"}, "mapped.example": {"::ffff:203.0.113.1"},
	}}
	for production, c := range map[string]struct{ refused, allowed []string }{
		"http://api.example": {
			refused: []string{
				"http://api.example", "http://API.example:80", "http://api.example.:80", "http://alias.example", "http://six.example",
				"http://mapped.example", "http://203.0.113.1", "http://[2001:db8::1]", "http://[::ffff:203.0.113.1]:80", "https://api.example:80",
			},
			allowed: []string{"https://api.example", "http://api.example:8080", "http://test.example", "http://localhost"},
		},
		"https://api.example": {refused: []string{"https://alias.example", "http://203.0.113.1:443"}, allowed: []string{"http://alias.example"}},
		"http://localhost:3000": {
			refused: []string{
				"http://localhost:3000", "http://127.0.0.1:3000", "http://[::1]:3000", "http://127.9.9.9:3000", "http://0.0.0.0:3000",
				"http://mine.example:3000", "http://api.localhost:3000", "http://" + ownAddress(t) + ":3000",
			},
			allowed: []string{"http://localhost:3001", "http://test.example:3000"},
		},
		"http://[::1]:3000": {refused: []string{"http://localhost:3000", "http://127.0.0.1:3000"}, allowed: []string{"http://[::1]:3001"}},
	} {
		g := newGuard(t, resolver, "http://another.localhost:1", production)
		for _, target := range c.refused {
			err := g.Check(t.Context(), urlOf(t, target))
			require.ErrorIs(t, err, replayer.ErrProduction, "%s and %s", production, target)
			require.Contains(t, err.Error(), "captured for")
		}
		for _, target := range c.allowed {
			require.NoError(t, g.Check(t.Context(), urlOf(t, target)), "%s and %s", production, target)
		}
	}
}

func TestTheGuardLetsNothingPassThatItCannotTell(t *testing.T) {
	resolver := &names{of: map[string][]string{"test.example": {"203.0.113.2"}}}
	err := newGuard(t, resolver, "http://api.example").Check(t.Context(), urlOf(t, "http://test.example"))
	require.ErrorContains(t, err, "it cannot be told")
	require.NotErrorIs(t, err, replayer.ErrProduction)
	require.ErrorContains(t, newGuard(t, resolver).Check(t.Context(), urlOf(t, "http://gone.example")), "gone.example")
}

// TestTheGuardLooksAgainAtEachConnect: the name of the test system, or of the
// API, leads elsewhere after the start.
func TestTheGuardLooksAgainAtEachConnect(t *testing.T) {
	production, test := newAPI(t, nil), newAPI(t, nil)
	port := urlOf(t, test.URL).Port()
	for name, c := range map[string]struct {
		move func(*names)
		want error
	}{
		"nothing moves":          {func(*names) {}, nil},
		"the test system moves":  {func(n *names) { n.set("test.example", "203.0.113.3", "203.0.113.1") }, replayer.ErrProduction},
		"the API moves":          {func(n *names) { n.set("api.example", "198.51.100.1") }, replayer.ErrProduction},
		"the API's name is gone": {func(n *names) { n.set("api.example"); n.set("test.example", "203.0.113.1") }, replayer.ErrProduction},
		"both move":              {func(n *names) { n.set("api.example", "203.0.113.7"); n.set("test.example", "203.0.113.1") }, replayer.ErrProduction},
	} {
		t.Run(name, func(t *testing.T) {
			resolver := &names{of: map[string][]string{"api.example": {"203.0.113.1"}, "test.example": {"198.51.100.1"}}}
			var dialled []string // the outside, which leads to the test system
			var mu sync.Mutex
			g, err := replayer.NewGuard([]*url.URL{urlOf(t, "http://api.example:"+port)}, resolver, func(ctx context.Context, network, addr string) (net.Conn, error) {
				mu.Lock()
				defer mu.Unlock()
				dialled = append(dialled, addr)
				return new(net.Dialer).DialContext(ctx, network, test.Listener.Addr().String())
			})
			require.NoError(t, err)
			target := urlOf(t, "http://test.example:"+port)
			require.NoError(t, g.Check(t.Context(), target))
			up, err := replayer.NewUpstream(replayer.UpstreamOptions{URL: target, MaxConns: 2, Dial: g.DialContext})
			require.NoError(t, err)
			t.Cleanup(up.Close)

			b := newBooks(t)
			b.capture(t, many(3)...)
			before := len(test.seen())
			c.move(resolver)
			o := options(t, b, production.URL)
			o.Upstreams, o.Target = up, target.String()
			report := mustRun(t, o)
			if c.want == nil {
				require.Equal(t, replayer.EndFinished, report.End)
				require.Len(t, test.seen(), before+3)
				require.Contains(t, dialled, "198.51.100.1:"+port, "the address that was let pass, not the name")
				return
			}
			require.Equal(t, replayer.EndFailed, report.End)
			require.Equal(t, replayer.ExitUsage, report.ExitCode)
			require.Contains(t, report.Reason, "captured for")
			require.Empty(t, dialled)
			require.Len(t, test.seen(), before)
			require.Zero(t, report.Sent)
		})
	}
	require.Empty(t, production.seen())
}

func TestTheCommandRefusesProduction(t *testing.T) {
	n := newBroker(t)
	b := newBooks(t)
	b.capture(t, many(2)...)
	production, test := newAPI(t, nil), newAPI(t, nil)
	port := urlOf(t, production.URL).Port()
	routes := filepath.Join(t.TempDir(), "routes.yaml")
	require.NoError(t, os.WriteFile(routes, fmt.Appendf(nil, "routes:\n- name: a\n  upstream: {url: %q}\n", production.URL), 0o600))
	for _, byFile := range []bool{false, true} {
		for _, target := range []string{production.URL, "http://localhost:" + port, "http://[::1]:" + port, "https://LOCALHOST.:" + port} {
			p := command(t, b, n.server.ClientURL(), production.URL, "run", "--upstream", target)
			if byFile {
				p = command(t, b, n.server.ClientURL(), "", "run", "--upstream", target)
				p.Env = append(p.Env, "HOLDFAST_ROUTES_FILE="+routes)
			}
			require.Equal(t, replayer.ExitUsage, p.code(t), "%s", target)
			require.Contains(t, p.stderr.String(), "--upstream: ")
			require.Contains(t, p.stderr.String(), "a test replay must not reach it")
		}
	}
	p := command(t, b, n.server.ClientURL(), production.URL, "run", "--upstream", test.URL, "--output", "json")
	require.Equal(t, replayer.ExitReplayable, p.code(t), p.stderr.String())
	require.Len(t, test.seen(), 2)
	require.Empty(t, production.seen())
	require.Equal(t, map[capture.State]int64{capture.StateFailed: 2}, b.states(t))
	require.NotContains(t, p.stderr.String(), "nothing keeps")

	alone := command(t, b, n.server.ClientURL(), "", "run", "--upstream", test.URL, "--again")
	require.Equal(t, replayer.ExitReplayable, alone.code(t))
	require.Contains(t, alone.stderr.String(), "nothing keeps this test replay away")
}

// TestAProbeOfATestSystemIsGuardedToo: the health path goes the same way.
func TestAProbeOfATestSystemIsGuardedToo(t *testing.T) {
	a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) { w.WriteHeader(http.StatusNoContent) })
	g := newGuard(t, &names{}, a.URL)
	for _, health := range []string{"", "/health"} {
		up, err := replayer.NewUpstream(replayer.UpstreamOptions{URL: urlOf(t, strings.Replace(a.URL, "127.0.0.1", "localhost", 1)), Health: health, MaxConns: 1, Dial: g.DialContext})
		require.NoError(t, err)
		require.ErrorIs(t, up.Probe(t.Context()), replayer.ErrProduction)
		up.Close()
	}
	require.Empty(t, a.seen())
}
