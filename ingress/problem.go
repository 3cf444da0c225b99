package ingress

import (
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/ingress/internal/edge"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// proxyError is an error type of RFC 9209 section 2.3.
type proxyError string

const (
	errConnectionRefused   proxyError = "connection_refused"
	errConnectionLost      proxyError = "connection_terminated"
	errConnectionTimeout   proxyError = "connection_timeout"
	errReadTimeout         proxyError = "connection_read_timeout"
	errIncomplete          proxyError = "http_response_incomplete"
	errProtocol            proxyError = "http_protocol_error"
	errDestinationNotFound proxyError = "destination_not_found"
	errRequestError        proxyError = "http_request_error"
	errProxyInternal       proxyError = "proxy_internal_error"
	errDNS                 proxyError = "dns_error"
	errCertificate         proxyError = "tls_certificate_error"
)

// refusal is an answer that the ingress gives itself.
type refusal struct {
	status int
	err    proxyError
	detail string
	retry  time.Duration
}

// problem is what the client is told. id is uuid.Nil where there is none.
func (rf refusal) problem(id uuid.UUID) service.Problem {
	p := service.Problem{Status: rf.status, Detail: rf.detail, RetryAfter: rf.retry}
	if id != uuid.Nil {
		p.RequestID = id.String()
	}
	return p
}

func (rf refusal) proxyStatus() string { return "holdfast; error=" + string(rf.err) }

// write answers with the refusal. A client that has gone needs no answer.
func (rf refusal) write(x *edge.Exchange, id uuid.UUID, state stored) {
	p := rf.problem(id)
	fields := x.Answer[:0].Add("Proxy-Status", rf.proxyStatus())
	fields = appendOwn(fields, p.RequestID, state)
	body := p.JSON()
	fields = fields.Add("Content-Type", service.ProblemType).Add("X-Content-Type-Options", "nosniff")
	if p.RetryAfter > 0 {
		fields = fields.Add("Retry-After", p.RetrySeconds())
	}
	x.Head(rf.status, p.Title, fields, int64(len(body)))
	_ = x.Write(body)
	_ = x.End(nil)
}

// appendOwn appends the gateway's own fields of an answer.
func appendOwn(fields wire.Fields, id string, state stored) wire.Fields {
	if id != "" {
		fields = append(fields, wire.Field{Name: capture.HTTPHeaderID, Value: id})
	}
	if state != "" {
		fields = append(fields, wire.Field{Name: capture.HTTPHeaderStored, Value: string(state)})
	}
	return fields
}
