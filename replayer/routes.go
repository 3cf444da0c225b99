package replayer

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"github.com/holdfast-io/holdfast/pkg/route"
)

// RoutesOptions describe the APIs of all routes.
type RoutesOptions struct {
	Routes []*route.Route
	// CAFile holds the certificates that those of APIs are checked against; empty
	// means the system's.
	CAFile string
	// PreserveHost leaves the captured Host header; else each API sees its own.
	PreserveHost bool
	// Health is the path of an API's health where its route names none.
	Health string
	// MaxConns is how many connections there may be to one API.
	MaxConns int
}

// Routes leads each request to the API of its route. Routes with the same API
// share its connections. It is safe for concurrent use.
type Routes struct {
	of     map[string]*Upstream
	broken map[string]error
	apis   map[string]*Upstream // by scheme and host
}

// NewRoutes reads the certificates and the values of headers that routes set, so
// that a token is as fresh as the run. A value that cannot be read is in the way
// of that route alone: For gives the error. It does not connect.
func NewRoutes(o RoutesOptions) (*Routes, error) {
	rs := &Routes{of: make(map[string]*Upstream), broken: make(map[string]error), apis: make(map[string]*Upstream)}
	for _, r := range o.Routes {
		shared, err := rs.share(r.Upstream, o)
		if err != nil {
			rs.Close()
			return nil, fmt.Errorf("route %s: %w", r.Name, err)
		}
		up := &Upstream{api: shared.api, keep: r.KeepAnswers, health: cmp.Or(r.Health, o.Health)}
		if !o.PreserveHost {
			up.host = r.Upstream.Host
		}
		for _, h := range r.SetHeaders {
			value, err := readValue(h.File)
			if err != nil {
				rs.broken[r.Name] = fmt.Errorf("route %s: set header %s from %s: %w", r.Name, h.Name, h.File, err)
				break
			}
			up.set = append(up.set, header{name: h.Name, value: value})
		}
		rs.of[r.Name] = up
	}
	return rs, nil
}

func (rs *Routes) share(u *url.URL, o RoutesOptions) (*Upstream, error) {
	key := u.Scheme + "://" + strings.ToLower(u.Host)
	if up, ok := rs.apis[key]; ok {
		return up, nil
	}
	up, err := NewUpstream(UpstreamOptions{URL: u, CAFile: o.CAFile, MaxConns: o.MaxConns})
	if err == nil {
		rs.apis[key] = up
	}
	return up, err
}

// For gives the upstream of a route.
func (rs *Routes) For(name string) (*Upstream, error) {
	if err := rs.broken[name]; err != nil {
		return nil, err
	}
	if up, ok := rs.of[name]; ok {
		return up, nil
	}
	return nil, fmt.Errorf("route %s: %w", printable(name), ErrNoUpstream)
}

// Several reports whether the routes have more than one API.
func (rs *Routes) Several() bool { return len(rs.apis) > 1 }

// Close closes idle connections.
func (rs *Routes) Close() {
	for _, up := range rs.apis {
		up.Close()
	}
}

// maxValue bounds a header's value: servers take 8 KiB of all headers together
// at least, and seldom more than 64.
const maxValue = 64 << 10

// readValue reads the value of a header from a file. One newline at its end is
// not part of it. Errors never hold the value.
func readValue(path string) (string, error) {
	// The path stands in the message already.
	bare := func(err error) error {
		if p, ok := errors.AsType[*os.PathError](err); ok {
			return p.Err
		}
		return err
	}
	// Before it is opened: to open a pipe may take for ever.
	info, err := os.Stat(path)
	if err != nil {
		return "", bare(err)
	}
	if !info.Mode().IsRegular() {
		return "", errors.New("is not a file")
	}
	f, err := os.Open(path)
	if err != nil {
		return "", bare(err)
	}
	defer func() { _ = f.Close() }() // nothing was written
	data, err := io.ReadAll(io.LimitReader(f, maxValue+1))
	if err != nil {
		return "", bare(err)
	}
	value := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	switch {
	case len(data) > maxValue:
		return "", errors.New("the file is larger than 64KiB")
	case strings.TrimSpace(value) == "":
		return "", errors.New("the file is empty")
	case strings.ContainsFunc(value, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }):
		return "", errors.New("the file holds a control character, or more than one line")
	}
	return value, nil
}
