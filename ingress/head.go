package ingress

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/ingress/internal/edge"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// headWriter writes the head of a request as it is captured and forwarded.
type headWriter struct {
	trusted service.Prefixes
}

// noFraming is the length of a request that neither has a body nor tells of one.
const noFraming int64 = -3

// append appends the head as HTTP/1.1: request line and fields as they came,
// without those that end at this hop (RFC 9110 section 7.6.1), those that only
// the gateway may set, and those by which proxies tell of the client, which are
// believed from trusted ones alone. length is that of the body, wire.Chunked, or
// noFraming.
func (hw headWriter) append(dst []byte, x *edge.Exchange, rt *destination, length int64) []byte {
	req := &x.Request
	dst = append(dst, req.Method...)
	dst = append(dst, ' ')
	dst = append(dst, req.Target...)
	dst = append(dst, " HTTP/1.1\r\n"...)
	host := req.Host
	if rt.ownHost || host == "" { // HTTP/1.0 knows requests without one
		host = rt.Upstream.Host
	}
	dst = wire.AppendField(dst, "Host", host)

	trusted := hw.trusted.Contains(x.Remote.Addr())
	hostTold, protoTold := false, false
	for i := range req.Fields {
		f := &req.Fields[i]
		kind := f.Kind
		if kind == wire.Other {
			if kind = f.Meaning(); capture.IsOwnHTTPHeader(f.Name) {
				continue
			}
		}
		switch kind {
		case wire.Other, wire.Via, wire.Date, wire.ContentType:
		case wire.ForwardedHost, wire.ForwardedProto, wire.Forwarded:
			// In another spelling only who does not mean it writes them.
			if !trusted || f.Kind != kind {
				continue
			}
			hostTold = hostTold || kind == wire.ForwardedHost
			protoTold = protoTold || kind == wire.ForwardedProto
		default: // framing, hop-by-hop, and what is written anew
			continue
		}
		if nominated(req.Nominated, f.Name) {
			continue
		}
		dst = wire.AppendField(dst, f.Name, f.Value)
	}
	return hw.appendForwarding(dst, x, trusted, hostTold, protoTold, length)
}

// nominated reports whether a Connection field has made the name hop-by-hop.
func nominated(names []string, name string) bool {
	for _, n := range names {
		if strings.EqualFold(n, name) {
			return true
		}
	}
	return false
}

// appendForwarding appends what the gateway says of the client and of itself,
// the framing, and the end of the head.
func (hw headWriter) appendForwarding(dst []byte, x *edge.Exchange, trusted, hostTold, protoTold bool, length int64) []byte {
	req := &x.Request
	dst = append(dst, "X-Forwarded-For: "...)
	if trusted {
		for i := range req.Fields {
			if req.Fields[i].Kind == wire.ForwardedFor {
				dst = append(dst, req.Fields[i].Value...)
				dst = append(dst, ", "...)
			}
		}
	}
	dst = appendAddr(dst, x.Remote)
	dst = append(dst, "\r\n"...)
	if req.Host != "" && !hostTold {
		dst = wire.AppendField(dst, "X-Forwarded-Host", req.Host)
	}
	if !protoTold {
		proto := "http"
		if x.TLS {
			proto = "https"
		}
		dst = wire.AppendField(dst, "X-Forwarded-Proto", proto)
	}
	dst = append(dst, "Via: "...)
	dst = strconv.AppendInt(dst, int64(req.Major), 10)
	dst = append(dst, '.')
	dst = strconv.AppendInt(dst, int64(req.Minor), 10)
	dst = append(dst, " holdfast\r\n"...)
	switch {
	case length == wire.Chunked:
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
	case length >= 0:
		dst = append(dst, "Content-Length: "...)
		dst = strconv.AppendInt(dst, length, 10)
		dst = append(dst, "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

func appendAddr(dst []byte, addr netip.AddrPort) []byte {
	if !addr.IsValid() {
		return append(dst, "unknown"...)
	}
	return addr.Addr().AppendTo(dst)
}

// appendEnd appends the head's end as it goes to the API: what only the API of
// this moment is told, and the empty line. It replaces the empty line of the
// captured head.
func appendEnd(dst []byte, id uuid.UUID, x *edge.Exchange, upgrade string) []byte {
	dst = append(dst, capture.HTTPHeaderID...)
	dst = append(dst, ": "...)
	dst = append(dst, id.String()...)
	dst = append(dst, "\r\n"...)
	switch {
	case upgrade != "":
		dst = append(dst, "Connection: Upgrade\r\n"...)
		dst = wire.AppendField(dst, "Upgrade", upgrade)
	case wire.HasToken(x.Request.Fields.Get("TE"), "trailers"):
		// Whoever takes trailers gets them: this hop passes them on.
		dst = append(dst, "Connection: TE\r\nTE: trailers\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// trailerFields gives the fields of a trailer section that may be passed on.
// Framing, routing and our own names have no place there (RFC 9110 section
// 6.5.1).
func trailerFields(fields wire.Fields) wire.Fields {
	var kept wire.Fields
	for _, f := range fields {
		switch kind := f.Meaning(); {
		case kind.HopByHop(), kind == wire.Host, kind == wire.ContentLength, kind == wire.Expect, capture.IsOwnHTTPHeader(f.Name):
		case kind == wire.Forwarded, kind == wire.ForwardedFor, kind == wire.ForwardedHost, kind == wire.ForwardedProto:
		default:
			kept = append(kept, f)
		}
	}
	return kept
}
