package ingress

import (
	"crypto/tls"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// isGRPC reports whether the request is a gRPC call. Its messages go both ways at
// once, for as long as it likes: there is no request to be stored before it is
// answered.
func (t *transaction) isGRPC() bool {
	const media = "application/grpc"
	contentType := t.x.Request.Fields.Get("Content-Type")
	return len(contentType) >= len(media) && strings.EqualFold(contentType[:len(media)], media)
}

// newHTTP2Transport speaks HTTP/2 with the API: negotiated where it has an https
// URL, with prior knowledge where not. It connects when it is first used.
func newHTTP2Transport(cfg *tls.Config, timeout time.Duration) *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Transport{
		Protocols: protocols, TLSClientConfig: cfg, DisableCompression: true,
		ResponseHeaderTimeout: timeout, IdleConnTimeout: 30 * time.Second,
	}
}

// proxyGRPC passes a call that came over HTTP/2 on as HTTP/2. Over HTTP/1.1,
// gRPC-Web for instance, it is a request like others.
func (t *transaction) proxyGRPC() {
	w, r := t.x.HTTP()
	if w == nil {
		t.proxyUncaptured()
		return
	}
	t.begun = time.Now()
	proxy := httputil.ReverseProxy{
		Transport:     t.rt.http2,
		FlushInterval: -1,
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = t.rt.Upstream.Scheme, t.rt.Upstream.Host
			if t.rt.ownHost {
				p.Out.Host = t.rt.Upstream.Host
			}
			for name := range p.Out.Header {
				f := wire.Field{Name: name, Kind: wire.KindOf(name)}
				if capture.IsOwnHTTPHeader(name) || f.Meaning() != f.Kind {
					p.Out.Header.Del(name)
				}
			}
			p.Out.Header.Set(capture.HTTPHeaderID, t.id.String())
			if t.h.head.trusted.Contains(t.x.Remote.Addr()) {
				p.Out.Header["X-Forwarded-For"] = p.In.Header["X-Forwarded-For"]
			}
			p.SetXForwarded()
			p.Out.Header.Add("Via", "2.0 holdfast")
		},
		ModifyResponse: func(resp *http.Response) error {
			t.h.m.upstreamDuration.Observe(since(t.begun))
			t.code = resp.StatusCode
			resp.Header.Set(capture.HTTPHeaderID, t.id.String())
			resp.Header.Add("Via", "2.0 holdfast")
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			rf := describeFailure(err)
			t.code, t.errText = rf.status, err.Error()
			rf.writeHTTP(w, t.id)
		},
	}
	proxy.ServeHTTP(w, r)
}

// writeHTTP answers with the refusal where net/http has the client.
func (rf refusal) writeHTTP(w http.ResponseWriter, id uuid.UUID) {
	w.Header().Set("Proxy-Status", rf.proxyStatus())
	w.Header().Set(capture.HTTPHeaderID, id.String())
	service.WriteProblem(w, rf.problem(id))
}
