package exchange

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// Redacted stands in an export for a value that was left out of it.
const Redacted = "[redacted]"

// secret reports whether values of this field are left out of exports, in any
// spelling that a server may take for it.
func secret(name string) bool {
	name = strings.ReplaceAll(name, "_", "-")
	return wire.Equal(name, "Authorization") || wire.Equal(name, "Cookie")
}

// Bounds of heads and trailer sections: far above those of servers.
const (
	maxHead   = 1 << 20
	maxFields = 10_000
)

// noFraming is the length of a request that neither has a body nor tells of one.
const noFraming int64 = -3

// request is a request without its body, in the form that is captured: fields are
// those that are passed on.
type request struct {
	method, target, host string
	fields               wire.Fields // without Host and framing
	trailer              wire.Fields
	length               int64 // of the body, wire.Chunked, or noFraming
}

// appendHead appends the head, its empty line included. A body in the chunked
// coding is announced as such.
func (q *request) appendHead(dst []byte, more ...wire.Field) []byte {
	dst = append(dst, q.method...)
	dst = append(dst, ' ')
	dst = append(dst, q.target...)
	dst = append(dst, " HTTP/1.1\r\n"...)
	dst = wire.AppendField(dst, "Host", q.host)
	for _, f := range q.fields {
		dst = wire.AppendField(dst, f.Name, f.Value)
	}
	for _, f := range more {
		dst = wire.AppendField(dst, f.Name, f.Value)
	}
	if f, ok := q.framing(); ok {
		dst = wire.AppendField(dst, f.Name, f.Value)
	}
	return append(dst, "\r\n"...)
}

// framing gives the field that tells of the body, if there is one.
func (q *request) framing() (wire.Field, bool) {
	switch {
	case q.length == wire.Chunked:
		return wire.Field{Name: "Transfer-Encoding", Value: "chunked", Kind: wire.TransferEncoding}, true
	case q.length >= 0:
		return wire.Field{Name: "Content-Length", Value: strconv.FormatInt(q.length, 10), Kind: wire.ContentLength}, true
	}
	return wire.Field{}, false
}

// digest is what tells two contents apart: of head, body and trailer section.
// Values that were left out do not count.
func (q *request) digest(body [sha256.Size]byte) string {
	bare := *q
	bare.fields = nil
	for _, f := range q.fields {
		if !(secret(f.Name) && f.Value == Redacted) {
			bare.fields = append(bare.fields, f)
		}
	}
	data := bare.appendHead(nil)
	for _, f := range q.trailer {
		data = wire.AppendField(data, f.Name, f.Value)
	}
	sum := sha256.Sum256(append(data, body[:]...))
	return hex.EncodeToString(sum[:])
}

// forwarded gives the fields that the gateway would have captured of these: none
// that ends at a hop, frames the message, or is the gateway's own. Proxies' words
// about the client stay: who wrote the file is trusted with them. redacted tells
// whether a value that an export has left out was dropped.
func forwarded(fields wire.Fields) (kept wire.Fields, host string, redacted bool) {
	var nominated []string
	for _, f := range fields {
		if f.Kind == wire.Connection {
			for name := range strings.SplitSeq(f.Value, ",") {
				nominated = append(nominated, strings.Trim(name, " \t"))
			}
		}
	}
fields:
	for i := range fields {
		f := fields[i]
		kind := f.Meaning()
		switch kind {
		case wire.Other, wire.Via, wire.Date, wire.ContentType:
		case wire.ForwardedFor, wire.ForwardedHost, wire.ForwardedProto, wire.Forwarded:
			if f.Kind != kind {
				continue // in another spelling only who does not mean it writes them
			}
		case wire.Host:
			if f.Kind == kind && host == "" {
				host = f.Value
			}
			continue
		default:
			continue
		}
		if capture.IsOwnHTTPHeader(f.Name) {
			continue
		}
		for _, name := range nominated {
			if wire.Equal(name, f.Name) {
				continue fields
			}
		}
		if secret(f.Name) && f.Value == Redacted {
			redacted = true
			continue
		}
		kept = append(kept, f)
	}
	return kept, host, redacted
}

// trailing gives the fields of a trailer section that may be passed on.
func trailing(fields wire.Fields) wire.Fields {
	var kept wire.Fields
	for i := range fields {
		switch kind := fields[i].Meaning(); kind {
		case wire.Other, wire.Via, wire.Date, wire.ContentType:
			f := fields[i]
			if !capture.IsOwnHTTPHeader(f.Name) && !(secret(f.Name) && f.Value == Redacted) {
				kept = append(kept, f)
			}
		}
	}
	return kept
}

// newID makes the id of an imported request: a UUIDv7 of its time, to the 4096th
// part of a millisecond, whose other bits are made of its content, what the file
// calls it, and the how-manieth it is in its file of those that are equal in all
// this.
func newID(at time.Time, digest, mark string, nth int) uuid.UUID {
	sum := sha256.Sum256([]byte(strings.Join([]string{
		"holdfast import 1", strconv.FormatInt(at.UnixNano(), 10), digest, strconv.Itoa(nth), mark,
	}, "\n")))
	var id uuid.UUID
	ns := at.UnixNano()
	ms, part := ns/1e6, (ns%1e6)*4096/1e6
	binary.BigEndian.PutUint64(id[:8], uint64(ms)<<16|0x7000|uint64(part))
	copy(id[8:], sum[:8])
	id[8] = id[8]&0x3f | 0x80
	return id
}
