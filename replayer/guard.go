package replayer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Resolver gives the addresses of names; [*net.Resolver] is the real one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Guard keeps a test replay away from the APIs that requests were captured for.
// It knows them by host and port, by name and by every address that a name has
// led to since the guard was made. All names and addresses of this machine are
// one. It is safe for concurrent use.
//
// It cannot know what stands behind an address: a proxy or a balancer that leads
// to such an API, an ingress for instance, is another address.
type Guard struct {
	resolver Resolver
	dial     func(ctx context.Context, network, addr string) (net.Conn, error)
	own      map[netip.Addr]struct{} // addresses of this machine's interfaces
	places   map[place]struct{}

	mu    sync.Mutex
	known map[netip.AddrPort]place
}

// place is a host, in lower case and without a dot at its end, with a port.
type place struct {
	host string
	port uint16
}

func (p place) String() string { return net.JoinHostPort(p.host, strconv.Itoa(int(p.port))) }

// NewGuard makes a guard of the APIs. It looks nothing up. dial may be nil.
func NewGuard(production []*url.URL, resolver Resolver, dial func(ctx context.Context, network, addr string) (net.Conn, error)) (*Guard, error) {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	g := &Guard{
		resolver: resolver, dial: dial,
		own: make(map[netip.Addr]struct{}), places: make(map[place]struct{}), known: make(map[netip.AddrPort]place),
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("read the addresses of this machine: %w", err)
	}
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			g.own[plain(prefix.Addr())] = struct{}{}
		}
	}
	for _, u := range production {
		p, err := placeOf(addrOf(u))
		if err != nil {
			return nil, err
		}
		g.places[p] = struct{}{}
	}
	return g, nil
}

func placeOf(addr string) (place, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return place{}, fmt.Errorf("address %q: %w", addr, err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return place{}, fmt.Errorf("address %q: the port is no number", addr)
	}
	return place{host: strings.TrimSuffix(strings.ToLower(host), "."), port: uint16(n)}, nil
}

// plain is an address without zone, and as IPv4 where it is one in disguise.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

// here stands for all addresses of this machine.
var here = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// canonical makes all addresses of this machine one.
func (g *Guard) canonical(a netip.Addr) netip.Addr {
	a = plain(a)
	if _, own := g.own[a]; own || a.IsLoopback() || a.IsUnspecified() {
		return here
	}
	return a
}

// lookup gives the addresses of a host.
func (g *Guard) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	// RFC 6761: such names lead here, whatever a resolver says.
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return []netip.Addr{here, netip.IPv6Loopback()}, nil
	}
	addrs, err := g.resolver.LookupNetIP(ctx, "ip", host)
	if err == nil && len(addrs) == 0 {
		err = errors.New("it has no address")
	}
	if err != nil {
		return nil, fmt.Errorf("look up %s: %w", host, err)
	}
	return addrs, nil
}

// Check refuses a target that is one of the APIs: the error wraps
// [ErrProduction] then. It fails, too, where the target or one of the APIs cannot
// be looked up, for then nobody knows.
func (g *Guard) Check(ctx context.Context, target *url.URL) error {
	p, err := placeOf(addrOf(target))
	if err != nil {
		return err
	}
	if _, err := g.pass(ctx, p, true); err != nil {
		return err
	}
	return nil
}

// DialContext connects to an address that the guard has just looked up and let
// pass. An API that cannot be looked up any more is where it was before.
func (g *Guard) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	p, err := placeOf(addr)
	if err != nil {
		return nil, err
	}
	addrs, err := g.pass(ctx, p, false)
	if err != nil {
		return nil, err
	}
	for i, a := range addrs {
		// Each has its share of the time: one that does not answer is not the last.
		one, cancel := ctx, func() {}
		if deadline, ok := ctx.Deadline(); ok {
			one, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(len(addrs)-i))
		}
		var c net.Conn
		c, err = g.dial(one, network, netip.AddrPortFrom(a, p.port).String())
		cancel()
		if err == nil {
			return c, nil
		}
	}
	return nil, err
}

// pass gives the addresses of a place that is none of the APIs.
func (g *Guard) pass(ctx context.Context, target place, all bool) ([]netip.Addr, error) {
	if _, same := g.places[target]; same {
		return nil, fmt.Errorf("%s is an API that requests were captured for: %w", target, ErrProduction)
	}
	addrs, err := g.lookup(ctx, target.host)
	if err != nil {
		return nil, err
	}
	if err := g.learn(ctx, all); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, a := range addrs {
		if p, same := g.known[netip.AddrPortFrom(g.canonical(a), target.port)]; same {
			return nil, fmt.Errorf("%s leads to %s, where %s is, an API that requests were captured for: %w", target, a, p, ErrProduction)
		}
	}
	return addrs, nil
}

// learn looks the APIs up. With all, each must be found.
func (g *Guard) learn(ctx context.Context, all bool) error {
	byPlace := func(a, b place) int { return strings.Compare(a.String(), b.String()) }
	for _, p := range slices.SortedFunc(maps.Keys(g.places), byPlace) {
		addrs, err := g.lookup(ctx, p.host)
		if err != nil && all {
			return fmt.Errorf("it cannot be told whether the target is %s, an API that requests were captured for: %w", p, err)
		}
		g.mu.Lock()
		for _, a := range addrs {
			g.known[netip.AddrPortFrom(g.canonical(a), p.port)] = p
		}
		g.mu.Unlock()
	}
	return nil
}
