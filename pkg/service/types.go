package service

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
)

// The types of settings implement encoding.TextUnmarshaler, which envconfig and
// YAML decoders use. Their errors say what is wrong and what is allowed, and
// never repeat the value, which may be a secret.

// ByteSize is a number of bytes, written as 32MiB, 10GiB, 1.5GB or a plain number.
type ByteSize int64

// UnmarshalText reads a size. Units are KiB, MiB, GiB, TiB (powers of 1024) and
// kB, MB, GB, TB (powers of 1000).
func (b *ByteSize) UnmarshalText(text []byte) error {
	n, err := humanize.ParseBytes(strings.TrimSpace(string(text)))
	if err != nil || n > math.MaxInt64 {
		return errors.New("is not a size; write a number of bytes, or one with KiB, MiB or GiB, for instance 32MiB")
	}
	*b = ByteSize(n)
	return nil
}

// String gives the exact size in the largest unit that divides it, as it may be
// written in a setting: 32MiB, 1000.
func (b ByteSize) String() string {
	units := []string{"", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	n, unit := int64(b), 0
	for n != 0 && n%1024 == 0 && unit < len(units)-1 {
		n, unit = n/1024, unit+1
	}
	return strconv.FormatInt(n, 10) + units[unit]
}

// MarshalText gives the same as String.
func (b ByteSize) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// Addr is where a listener binds: host:port, where an empty host means all
// addresses and port 0 any free port.
type Addr string

// UnmarshalText reads an address. The port is a number; the host is not resolved.
func (a *Addr) UnmarshalText(text []byte) error {
	host, port, err := net.SplitHostPort(string(text))
	if err != nil || strings.ContainsAny(host, " /@") {
		return errors.New("is not an address; write host:port or :port, for instance 127.0.0.1:8080")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return errors.New("has no port from 0 to 65535; write for instance 127.0.0.1:8080")
	}
	*a = Addr(text)
	return nil
}

// IsLoopback says whether only this machine can reach the address: the host is
// localhost or a loopback IP. Other names are not resolved and count as
// reachable.
func (a Addr) IsLoopback() bool {
	host, _, err := net.SplitHostPort(string(a))
	if err != nil {
		return false
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// URL is the base of an HTTP API: scheme http or https, a host, perhaps a path;
// no user info, query or fragment. The zero value means none.
type URL struct {
	url.URL
}

// UnmarshalText reads a URL.
func (u *URL) UnmarshalText(text []byte) error {
	// The error of url.Parse repeats the text, which may hold a password.
	p, err := url.Parse(string(text))
	switch {
	case err != nil:
		return errors.New("is not a URL; write for instance http://api.example.com:8080")
	case p.Scheme != "http" && p.Scheme != "https":
		return errors.New("has a scheme that is not allowed; allowed are http and https")
	case p.Hostname() == "":
		return errors.New("has no host; write for instance http://api.example.com:8080")
	case p.User != nil:
		return errors.New("holds user info, which is not allowed")
	case p.RawQuery != "" || p.ForceQuery:
		return errors.New("has a query, which is not allowed")
	case p.Fragment != "" || strings.HasSuffix(string(text), "#"):
		return errors.New("has a fragment, which is not allowed")
	}
	if port := p.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return errors.New("has no port from 1 to 65535")
		}
	}
	u.URL = *p
	return nil
}

// IsZero says whether there is none.
func (u URL) IsZero() bool { return u.Host == "" }

// String gives the URL as text, empty when there is none.
func (u URL) String() string { return u.URL.String() }

// MarshalText gives the same as String.
func (u URL) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// sqlite begins the address of a SQLite ledger. What follows is a path as it
// stands, not a URL: it may hold spaces, commas and percent signs.
const sqlite = "sqlite://"

// ConnURL is how to reach a broker or a database: one URL, several separated by
// commas, or sqlite:// and a path. It may hold a password: String, MarshalText
// and GoString, and so fmt, slog and JSON, show it without user info and query.
// Raw shows all of it.
type ConnURL string

// UnmarshalText reads the URLs; which schemes are allowed is the setting's.
func (c *ConnURL) UnmarshalText(text []byte) error {
	for _, one := range ConnURL(text).each() {
		if path, ok := strings.CutPrefix(one, sqlite); ok {
			if path == "" {
				return errors.New("has no path; write for instance sqlite:///var/lib/holdfast/ledger.db")
			}
			continue
		}
		// The error of url.Parse repeats the text.
		p, err := url.Parse(one)
		if err != nil || p.Scheme == "" || p.Opaque != "" || strings.HasSuffix(p.Host, ",") {
			return errors.New("is not a URL; write scheme://host:port")
		}
	}
	*c = ConnURL(text)
	return nil
}

// each gives the single URLs. A comma separates them only where a scheme
// follows: PostgreSQL's own URLs list hosts with commas.
func (c ConnURL) each() []string {
	if strings.HasPrefix(string(c), sqlite) {
		return []string{string(c)}
	}
	parts := strings.Split(string(c), ",")
	for i, part := range parts {
		if !strings.Contains(part, "://") {
			return []string{string(c)}
		}
		parts[i] = strings.TrimSpace(part)
	}
	return parts
}

// Raw gives the text as it was set, with its secrets.
func (c ConnURL) Raw() string { return string(c) }

// String gives the URLs without user info and query.
func (c ConnURL) String() string {
	if c == "" {
		return ""
	}
	var shown []string
	for _, one := range c.each() {
		if !strings.HasPrefix(one, sqlite) {
			p, err := url.Parse(one)
			if err != nil {
				one = "(not a URL)"
			} else {
				p.User, p.RawQuery, p.Fragment, p.ForceQuery = nil, "", "", false
				one = p.String()
			}
		}
		shown = append(shown, one)
	}
	return strings.Join(shown, ",")
}

// GoString gives the same as String, so that %#v keeps the secret too.
func (c ConnURL) GoString() string { return strconv.Quote(c.String()) }

// MarshalText gives the same as String.
func (c ConnURL) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

func (c ConnURL) hasScheme(allowed []string) bool {
	for _, one := range c.each() {
		scheme, _, _ := strings.Cut(one, ":")
		if !slices.Contains(allowed, strings.ToLower(scheme)) {
			return false
		}
	}
	return true
}

// Methods is a set of HTTP methods, written with commas between; * means all.
type Methods []string

// UnmarshalText reads the methods. Their case counts, as in HTTP.
func (m *Methods) UnmarshalText(text []byte) error {
	var methods Methods
	for one := range strings.SplitSeq(string(text), ",") {
		one = strings.TrimSpace(one)
		if !isToken(one) {
			return errors.New("is not a list of methods; write for instance POST,PUT or *")
		}
		methods = append(methods, one)
	}
	*m = methods
	return nil
}

// Has says whether the set holds the method.
func (m Methods) Has(method string) bool {
	return slices.Contains(m, method) || slices.Contains(m, "*")
}

// Prefixes is a list of networks, written with commas between; a single address
// is a network of one.
type Prefixes []netip.Prefix

// UnmarshalText reads the networks.
func (p *Prefixes) UnmarshalText(text []byte) error {
	var list Prefixes
	for one := range strings.SplitSeq(string(text), ",") {
		one = strings.TrimSpace(one)
		network, err := netip.ParsePrefix(one)
		if err != nil {
			addr, err := netip.ParseAddr(one)
			if err != nil {
				return errors.New("is not a list of addresses and networks; write for instance 10.0.0.0/8,192.168.1.7")
			}
			network = netip.PrefixFrom(addr.WithZone(""), addr.BitLen())
		}
		list = append(list, network.Masked())
	}
	*p = list
	return nil
}

// Contains says whether one of the networks holds the address. An IPv4 address
// in IPv6 form counts as IPv4.
func (p Prefixes) Contains(addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(p, func(n netip.Prefix) bool { return n.Contains(addr) })
}
