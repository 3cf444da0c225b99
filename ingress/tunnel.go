package ingress

import (
	"strings"
	"time"

	"github.com/holdfast-io/holdfast/pkg/upstream"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// tunnelIdle ends an upgraded connection on which nothing passes. Peers that
// have died are found earlier, by the kernel's keep-alive.
const tunnelIdle = time.Hour

// upgrade is the protocol that the request asks for, where it may have it. A
// WebSocket's handshake carries no data that could be replayed, and is never
// captured; other protocols pass where nothing is captured. The gateway does not
// speak h2c, and a client that offers it goes on with HTTP/1.1 (RFC 9110 section
// 7.8).
func (t *transaction) upgrade() string {
	req := &t.x.Request
	switch {
	case req.Upgrade == "" || req.Length != 0 || wire.HasToken(req.Upgrade, "h2c"):
		return ""
	case req.Method == "GET" && strings.EqualFold(req.Upgrade, "websocket"), !t.rt.Captures(req.Method):
		return req.Upgrade
	}
	return ""
}

// tunnel asks the API for another protocol, and carries the connection when it
// agrees.
func (t *transaction) tunnel(upgrade string) {
	t.b.head = t.h.head.append(t.b.head[:0], t.x, t.rt, noFraming)
	t.b.tail = appendEnd(t.b.tail[:0], t.id, t.x, upgrade)
	t.begun = time.Now()
	api, err := t.rt.pool.Begin(t.begun.Add(t.rt.Policy.Timeout), t.x.Request.Method, 0, nil, t.b.head[:len(t.b.head)-2], t.b.tail)
	if err != nil {
		t.finish(nil, err)
		return
	}
	api.AllowUpgrade()
	resp, err := api.Answer(t.passInterim)
	if err != nil || resp.Status != 101 {
		t.finish(api, err)
		return
	}
	t.carry(api, resp)
}

// carry passes the API's 101 on, and the bytes after it both ways.
func (t *transaction) carry(api *upstream.Exchange, resp *wire.Response) {
	defer api.Close()
	t.h.m.upstreamDuration.Observe(since(t.begun))
	other, first, err := api.Upgrade()
	if err != nil {
		t.noAnswer(err)
		return
	}
	t.code = 101
	fields := append(t.endToEnd(resp), wire.Field{Name: "Via", Value: "1.1 holdfast"}, wire.Field{Name: "Connection", Value: "Upgrade"})
	for _, protocol := range resp.Fields.Values("Upgrade") {
		fields = append(fields, wire.Field{Name: "Upgrade", Value: protocol})
	}
	t.h.m.upgraded.Inc()
	defer t.h.m.upgraded.Dec()
	t.x.Tunnel(resp.Reason, appendOwn(fields, t.id.String(), ""), other, first, tunnelIdle)
}
