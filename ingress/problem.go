package ingress

import (
	"net/http"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
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

func (rf refusal) write(w http.ResponseWriter, id uuid.UUID) {
	w.Header().Set("Proxy-Status", "holdfast; error="+string(rf.err))
	p := service.Problem{Status: rf.status, Detail: rf.detail, RetryAfter: rf.retry}
	if id != uuid.Nil {
		p.RequestID = id.String()
		w.Header()[capture.HTTPHeaderID] = []string{p.RequestID}
	}
	service.WriteProblem(w, p)
}
