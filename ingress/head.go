package ingress

import (
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
)

// hopByHop are the header names that end at this hop (RFC 9110 section 7.6.1),
// and those whose meaning the gateway itself fulfils (framing, expectations).
// Names are in net/http's canonical form.
var hopByHop = map[string]struct{}{
	"Connection":          {},
	"Proxy-Connection":    {},
	"Keep-Alive":          {},
	"Te":                  {},
	"Trailer":             {},
	"Transfer-Encoding":   {},
	"Upgrade":             {},
	"Proxy-Authenticate":  {},
	"Proxy-Authorization": {},
	"Content-Length":      {},
	"Expect":              {},
}

// forwarding are the headers by which proxies tell of the client. They are
// believed from trusted proxies only.
var forwarding = map[string]struct{}{
	"Forwarded":         {},
	"X-Forwarded-For":   {},
	"X-Forwarded-Host":  {},
	"X-Forwarded-Proto": {},
	"X-Forwarded-Port":  {},
	"X-Real-Ip":         {},
}

// connectionTokens are the header names that a Connection header adds to the
// hop-by-hop ones; nil in the common case.
func connectionTokens(h http.Header) map[string]struct{} {
	var tokens map[string]struct{}
	for _, line := range h["Connection"] {
		for token := range strings.SplitSeq(line, ",") {
			switch token = strings.TrimSpace(token); token {
			case "", "close", "keep-alive", "Keep-Alive", "Close":
			default:
				if tokens == nil {
					tokens = make(map[string]struct{})
				}
				tokens[http.CanonicalHeaderKey(token)] = struct{}{}
			}
		}
	}
	return tokens
}

// meaning is the name that a CGI-like API takes a name for: to it "_" is "-"
// (RFC 3875 section 4.1.18).
func meaning(name string) string {
	if strings.IndexByte(name, '_') < 0 {
		return name
	}
	return http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))
}

// headWriter writes the head of a request as it is captured and forwarded.
type headWriter struct {
	trusted service.Prefixes
}

// append appends the head as HTTP/1.1, with the target in origin form and, for
// size ≥ 0, an explicit Content-Length.
func (hw headWriter) append(dst []byte, r *http.Request, rt *route, size int64) []byte {
	dst = append(dst, r.Method...)
	dst = append(dst, ' ')
	dst = append(dst, originForm(r)...)
	dst = append(dst, " HTTP/1.1\r\nHost: "...)
	host := r.Host
	if rt.host || host == "" { // HTTP/1.0 knows requests without one
		host = rt.ownHost
	}
	dst = append(dst, host...)
	dst = append(dst, "\r\n"...)

	trusted := hw.trusted.Contains(remoteAddr(r))
	tokens := connectionTokens(r.Header)
	for name, values := range r.Header {
		meant := meaning(name)
		if _, ok := hopByHop[meant]; ok {
			continue
		}
		if _, ok := tokens[name]; ok {
			continue
		}
		if _, ok := forwarding[meant]; ok && (!trusted || meant != name || name == "X-Forwarded-For") {
			continue
		}
		if name == "Via" || capture.IsOwnHTTPHeader(name) {
			continue
		}
		for _, v := range values {
			dst = appendField(dst, name, v)
		}
	}
	return hw.appendForwarding(dst, r, trusted, size)
}

// appendForwarding appends what the gateway says of the client and of itself,
// and ends the head.
func (hw headWriter) appendForwarding(dst []byte, r *http.Request, trusted bool, size int64) []byte {
	dst = append(dst, "X-Forwarded-For: "...)
	if trusted {
		for _, v := range r.Header["X-Forwarded-For"] {
			dst = append(dst, v...)
			dst = append(dst, ", "...)
		}
	}
	addr, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		addr = r.RemoteAddr
	}
	dst = append(dst, addr...)
	dst = append(dst, "\r\n"...)
	if r.Host != "" && (!trusted || len(r.Header["X-Forwarded-Host"]) == 0) {
		dst = appendField(dst, "X-Forwarded-Host", r.Host)
	}
	if !trusted || len(r.Header["X-Forwarded-Proto"]) == 0 {
		proto := "http"
		if r.TLS != nil {
			proto = "https"
		}
		dst = appendField(dst, "X-Forwarded-Proto", proto)
	}
	dst = append(dst, "Via: "...)
	for _, v := range r.Header["Via"] {
		dst = append(dst, v...)
		dst = append(dst, ", "...)
	}
	dst = strconv.AppendInt(dst, int64(r.ProtoMajor), 10)
	dst = append(dst, '.')
	dst = strconv.AppendInt(dst, int64(r.ProtoMinor), 10)
	dst = append(dst, " holdfast\r\n"...)
	if size >= 0 {
		dst = append(dst, "Content-Length: "...)
		dst = strconv.AppendInt(dst, size, 10)
		dst = append(dst, "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

func appendField(dst []byte, name, value string) []byte {
	dst = append(dst, name...)
	dst = append(dst, ": "...)
	dst = append(dst, value...)
	return append(dst, "\r\n"...)
}

// forwardTail is the head's end as it goes to the API: what only the API is
// told, and the empty line. It replaces the empty line of the captured head.
func forwardTail(dst []byte, id uuid.UUID) []byte {
	dst = append(dst, capture.HTTPHeaderID...)
	dst = append(dst, ": "...)
	dst = append(dst, id.String()...)
	return append(dst, "\r\n\r\n"...)
}

// originForm is the target as the client sent it, without scheme and authority
// where it came in absolute form (RFC 9112 section 3.2).
func originForm(r *http.Request) string {
	target := r.RequestURI
	if strings.HasPrefix(target, "/") || target == "*" {
		return target
	}
	_, rest, ok := strings.Cut(target, "://")
	if !ok {
		return r.URL.RequestURI()
	}
	i := strings.IndexAny(rest, "/?")
	switch {
	case i < 0:
		return "/"
	case rest[i] == '?':
		return "/" + rest[i:]
	default:
		return rest[i:]
	}
}

func remoteAddr(r *http.Request) netip.Addr {
	addr, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return addr.Addr().Unmap()
}
