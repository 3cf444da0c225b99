package edge

import (
	"fmt"
	"slices"
	"strings"
)

// Case is one exchange: what a client sends over a connection of its own, and
// what becomes of it.
type Case struct {
	Class, Name string
	// Send is what the client sends, as it stands, at once. Each part of Then
	// follows when an interim answer 100 has come.
	Send string
	Then []string
	// HalfClose ends the sending side afterwards.
	HalfClose bool
	// Want says what the ingress answers, in order, and what becomes of the
	// connection; for instance "200 !400 close".
	//
	//	200        the API's answer
	//	200h       the API's answer to a HEAD request
	//	!400       a refusal of the ingress's own; !400|501 is either
	//	?400       such a refusal, or nothing at all
	//	103        an interim answer of the API's
	//	100        an interim answer of anybody's; others of this kind may come
	//	keep       the connection takes another request
	//	close      it is closed, and nothing else was answered
	//	any        either
	Want string
	// Reply is what the API answers.
	Reply Reply
	// Nginx says why it is right that another number of requests reaches the
	// API through nginx; empty where the numbers are the same.
	Nginx string
}

// Cases is the corpus. Names are unique within a class.
func Cases() []Case {
	var all []Case
	for _, group := range []struct {
		class string
		cases []Case
	}{
		{"method", methods()},
		{"target", targets()},
		{"absolute-form", absolutes()},
		{"header", headers()},
		{"own header", ownHeaders()},
		{"hop by hop", hopByHop()},
		{"body", bodies()},
		{"expect", expectations()},
		{"pipeline", pipelines()},
		{"http/1.0", oldClients()},
		{"answer", answers()},
		{"length attack", lengths()},
		{"coding attack", codings()},
		{"chunk attack", chunkAttacks()},
		{"field attack", fieldAttacks()},
		{"host attack", hosts()},
		{"request line attack", requestLines()},
		{"limit", limits()},
		{"cut short", cuts()},
	} {
		slices.SortFunc(group.cases, func(a, b Case) int { return strings.Compare(a.Name, b.Name) })
		for _, c := range group.cases {
			c.Class = group.class
			all = append(all, c)
		}
	}
	return all
}

// Authority is the host that the corpus's requests name.
const Authority = "api.test"

// raw is a request head without anything added.
func raw(lines ...string) string { return strings.Join(lines, "\r\n") + "\r\n\r\n" }

// head is a request head with a Host.
func head(start string, fields ...string) string {
	return raw(append([]string{start, "Host: " + Authority}, fields...)...)
}

// sized is a request with a Content-Length.
func sized(start, body string, fields ...string) string {
	return head(start, append(fields, fmt.Sprintf("Content-Length: %d", len(body)))...) + body
}

// chunked is a request in chunked coding, with the body as it is on the wire.
func chunked(start, wire string, fields ...string) string {
	return head(start, append(fields, "Transfer-Encoding: chunked")...) + wire
}

// another is a request that a careless server finds behind, or in, the one
// before.
var another = head("POST /smuggled HTTP/1.1", "Content-Length: 0")

// passes is a request that the API answers, on a connection that is kept.
func passes(name, send string) Case { return Case{Name: name, Send: send, Want: "200 keep"} }

// refused is a request that nobody sees but the ingress.
func refused(name, status, send string) Case {
	return Case{Name: name, Send: send, Want: "!" + status + " close"}
}

func (c Case) want(w string) Case       { c.Want = w; return c }
func (c Case) nginx(reason string) Case { c.Nginx = reason; return c }
func (c Case) reply(raw string) Case    { c.Reply.Raw = raw; return c }

func methods() (cases []Case) {
	for _, m := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} {
		cases = append(cases, passes(m, head(m+" /m HTTP/1.1")))
	}
	return append(cases,
		passes("HEAD", head("HEAD /m HTTP/1.1")).want("200h keep"),
		passes("TRACE", head("TRACE /m HTTP/1.1")).nginx("nginx answers 405 to TRACE; whether to is the API's matter"),
		passes("M-SEARCH", head("M-SEARCH /m HTTP/1.1")),
		passes("PROPFIND with a body", sized("PROPFIND /m HTTP/1.1", "<propfind/>")),
		passes("lower case", head("get /m HTTP/1.1")).nginx("nginx knows upper case only; methods are tokens (RFC 9110 section 9.1)"),
		passes("lower case post, not captured", sized("post /m HTTP/1.1", "hello")).nginx("as above"),
		passes("every token character", head("A!#$%&'*+-.^_`|~9 /m HTTP/1.1")).nginx("as above"),
		passes("long", head(strings.Repeat("M", 100)+" /m HTTP/1.1")),
		passes("DELETE with a body", sized("DELETE /m HTTP/1.1", "hello")),
		passes("GET with a body", sized("GET /m HTTP/1.1", "hello")),
		refused("not a token", "400", head("GE(T /m HTTP/1.1")),
		refused("not ASCII", "400", head("G\xc3\x8bT /m HTTP/1.1")),
		refused("CONNECT", "400", raw("CONNECT api.test:443 HTTP/1.1", "Host: api.test:443")),
		refused("CONNECT to a path", "400", head("CONNECT /m HTTP/1.1")),
	)
}

func targets() (cases []Case) {
	for name, target := range map[string]string{
		"encoded slash": "/a%2Fb%2fc", "two slashes": "//a//b", "slashes first": "//other.test/a", "dots": "/a/../b/./c",
		"encoded dots": "/a/%2e%2e/b", "empty query": "/a?", "two question marks": "/a??b?c", "query only": "/?", "parameters": "/a;b=c;d/e;f",
		"encoded space": "/a%20b", "plus": "/a+b?c+d", "colon": "/a:b", "looks absolute": "/http://other.test/", "comma": "/a,b", "at": "/@a",
		"dot": "/.", "tilde": "/~a", "encoded NUL in the query": "/a?b=%00", "bad encoding in the query": "/a?b=%zz%",
		"UTF-8": "/caf\xc3\xa9?\xe2\x82\xac", "Latin 1": "/caf\xe9", "pipe": "/a|b", "quote": "/a\"b", "angles": "/a<b>c", "caret": "/a^b",
		"back quote": "/a`b", "braces": "/a{b}c", "brackets": "/a[b]c", "backslash": "/a\\b", "apostrophe": "/a'b", "dollar": "/$a", "asterisk in a path": "/*",
		"encoded control": "/a%0d%0aX:%20y", "8 KiB": "/" + strings.Repeat("a", 8<<10), "query of 8 KiB": "/?" + strings.Repeat("q=1&", 2<<10),
	} {
		cases = append(cases, passes(name, head("GET "+target+" HTTP/1.1")), passes(name+", captured", sized("POST "+target+" HTTP/1.1", "x")))
	}
	const encoding = "nginx decodes the path to choose a location; the ingress passes it raw"
	return append(cases,
		passes("encoded NUL", head("GET /a%00b HTTP/1.1")).nginx(encoding),
		passes("bad encoding", head("GET /a%zz HTTP/1.1")).nginx(encoding),
		passes("cut encoding", head("GET /a% HTTP/1.1")).nginx(encoding),
		passes("dots first", head("GET /../a HTTP/1.1")).nginx(encoding),
		passes("dots first, captured", sized("POST /../a HTTP/1.1", "x")).nginx(encoding),
		passes("above the root", head("GET /a/../../b HTTP/1.1")).nginx(encoding),
		passes("asterisk", head("OPTIONS * HTTP/1.1")).nginx("nginx knows no asterisk-form"),
		refused("asterisk with GET", "400", head("GET * HTTP/1.1")),
		refused("asterisk and more", "400", head("OPTIONS *a HTTP/1.1")),
		refused("fragment", "400", head("GET /a#b HTTP/1.1")).nginx("nginx passes a fragment on; no client may send one (RFC 9112 section 3.2)"),
		refused("fragment in the query", "400", head("GET /a?b#c HTTP/1.1")).nginx("as above"),
		refused("no slash", "400", head("GET a HTTP/1.1")),
		refused("query without path", "400", head("GET ?a HTTP/1.1")),
		refused("DEL", "400", head("GET /a\x7fb HTTP/1.1")),
		refused("control byte", "400", head("GET /a\x01b HTTP/1.1")),
		refused("tab in the target", "400", head("GET /a\tb HTTP/1.1")),
		refused("NUL", "400", head("GET /a\x00b HTTP/1.1")),
	)
}

func absolutes() []Case {
	const elsewhere = "nginx takes the target's authority and passes it on; the ingress takes a contradiction for an attack"
	return []Case{
		passes("same host", head("GET http://api.test/a%2Fb?c HTTP/1.1")),
		passes("captured", sized("POST http://api.test/a HTTP/1.1", "x")),
		passes("no path", head("GET http://api.test HTTP/1.1")),
		passes("no path, OPTIONS", head("OPTIONS http://api.test HTTP/1.1")),
		passes("no path, a query", head("GET http://api.test?a=b HTTP/1.1")),
		passes("scheme in upper case", head("GET HTTP://api.test/a HTTP/1.1")),
		passes("host in upper case", head("GET http://API.TEST/a HTTP/1.1")),
		passes("with a port", raw("GET http://api.test:8080/a HTTP/1.1", "Host: api.test:8080")),
		passes("https", head("GET https://api.test/a HTTP/1.1")),
		refused("another host", "400", head("GET http://other.test/a HTTP/1.1")).nginx(elsewhere),
		refused("another host, captured", "400", sized("POST http://other.test/a HTTP/1.1", "x")).nginx(elsewhere),
		refused("another port", "400", head("GET http://api.test:81/a HTTP/1.1")).nginx(elsewhere),
		refused("user", "400", head("GET http://user@api.test/a HTTP/1.1")),
		refused("user and password", "400", head("GET http://user:secret@api.test/a HTTP/1.1")),
		refused("another scheme", "400", head("GET ftp://api.test/a HTTP/1.1")).nginx("nginx takes every scheme for its own"),
		refused("file", "400", head("GET file:///etc/passwd HTTP/1.1")),
		refused("no authority", "400", head("GET http:///a HTTP/1.1")),
		refused("fragment", "400", head("GET http://api.test/a#b HTTP/1.1")).nginx("nginx passes a fragment on"),
		refused("authority form", "400", head("GET api.test:80 HTTP/1.1")),
		refused("link-local service", "400", head("GET http://169.254.169.254/latest/meta-data HTTP/1.1")).nginx(elsewhere),
	}
}

func headers() []Case {
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("X-H%d: %d", i, i)
	}
	return []Case{
		passes("order of one name", head("GET /h HTTP/1.1", "X-A: 1", "X-B: 2", "x-a: 3", "X-A: 4", "X-B: 5")),
		passes("order of one name, captured", sized("POST /h HTTP/1.1", "x", "X-A: 1", "X-B: 2", "x-a: 3", "X-A: 4", "X-B: 5")),
		passes("spelling", head("GET /h HTTP/1.1", "x-lower: 1", "X-UPPER: 2", "x-MiXeD: 3", "eTAG: 4")),
		passes("spelling, captured", sized("POST /h HTTP/1.1", "x", "x-lower: 1", "X-UPPER: 2", "x-MiXeD: 3")),
		passes("empty values", head("GET /h HTTP/1.1", "X-Empty:", "X-Blank:   ", "X-Tab:\t", "X-Last: 1")),
		passes("white space around values", head("GET /h HTTP/1.1", "X-A:1", "X-B:   2", "X-C:\t3\t ", "X-D: 4 \t 5")),
		passes("obs-text", head("GET /h HTTP/1.1", "X-Latin: caf\xe9", "X-UTF8: \xe2\x82\xac", "X-Bytes: \x80\xff")),
		passes("obs-text, captured", sized("POST /h HTTP/1.1", "x", "X-Latin: caf\xe9", "X-UTF8: \xe2\x82\xac", "X-Bytes: \x80\xff")),
		passes("100 fields", head("GET /h HTTP/1.1", many...)),
		passes("100 fields, captured", sized("POST /h HTTP/1.1", "x", many...)),
		passes("long value", head("GET /h HTTP/1.1", "X-Long: "+strings.Repeat("v", 16<<10))),
		passes("long value, captured", sized("POST /h HTTP/1.1", "x", "X-Long: "+strings.Repeat("v", 16<<10))),
		passes("long name", head("GET /h HTTP/1.1", strings.Repeat("n", 1<<10)+": v")),
		passes("several cookies", head("GET /h HTTP/1.1", "Cookie: a=1; b=2", "Cookie: c=3", "cookie: d=\"4, 5\"")),
		passes("commas and quotes", head("GET /h HTTP/1.1", `X-List: a, "b, c",, d ,`, "X-List: , e")),
		passes("duplicates", head("GET /h HTTP/1.1", "X-Same: 1", "X-Same: 1", "Accept: a", "X-Same: 2", "Accept: a")),
		passes("two Authorizations", head("GET /h HTTP/1.1", "Authorization: a", "Authorization: b")).nginx("nginx refuses several; which counts is the API's matter"),
		passes("underscores", head("GET /h HTTP/1.1", "X_Under_Score: 1", "_: 2")),
		passes("every token character", head("GET /h HTTP/1.1", "X!#$%&'*+-.^_`|~9: 1")),
		passes("digits only", head("GET /h HTTP/1.1", "123: 456")),
		passes("no space after the colon", head("GET /h HTTP/1.1", "X-A:b:c:d")),
		passes("Host not first", raw("GET /h HTTP/1.1", "X-A: 1", "Host: api.test", "X-B: 2")),
		passes("Host in lower case", raw("GET /h HTTP/1.1", "host: api.test")),
		passes("end-to-end, of all sorts", head("GET /h HTTP/1.1", "Accept: */*", "Accept-Encoding: gzip;q=0, identity", "User-Agent: x (y; z)", "Cache-Control: no-cache",
			"Range: bytes=0-1", "If-None-Match: W/\"a\"", "Authorization: Bearer x", "Max-Forwards: 0", "Date: never", "Pragma: x", "Origin: null")),
		passes("no User-Agent, no Accept-Encoding", head("GET /h HTTP/1.1")),
		passes("idempotency and trace", sized("POST /h HTTP/1.1", "x", "Idempotency-Key: \"k\"", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate: a=b")),
		passes("NATS names", sized("POST /h HTTP/1.1", "x", "Nats-Msg-Id: 1", "Nats-Expected-Last-Sequence: 7", "Holdfast-Id: x")),
		passes("Via of others", head("GET /h HTTP/1.1", "Via: 1.0 fred, 1.1 p.example.net", "Via: 2 other")),
		passes("Via of others, captured", sized("POST /h HTTP/1.1", "x", "Via: 1.0 fred", "Via: 1.1 other (comment, with comma)")),
		passes("forwarding from a stranger", head("GET /h HTTP/1.1", "X-Forwarded-For: 10.0.0.1", "X-Forwarded-Host: other.test", "X-Forwarded-Proto: https",
			"X-Forwarded-Port: 1", "X-Real-IP: 10.0.0.1", "Forwarded: for=10.0.0.1")),
		passes("forwarding from a stranger, captured", sized("POST /h HTTP/1.1", "x", "x-forwarded-for: 10.0.0.1", "X-FORWARDED-PROTO: https", "forwarded: for=10.0.0.1")),
		passes("content fields without content", head("POST /h HTTP/1.1", "Content-Type: text/plain", "Content-Encoding: gzip")),
		passes("one empty line before", "\r\n"+head("GET /h HTTP/1.1")),
		refused("gRPC, captured", "415", sized("POST /pkg.Service/Method HTTP/1.1", "\x00\x00\x00\x00\x00", "Content-Type: application/grpc+proto", "TE: trailers")).
			want("!415 any").nginx("gRPC cannot be captured: nginx does not capture"),
	}
}

func ownHeaders() (cases []Case) {
	for _, name := range []string{"X-Request-UUID", "x-request-uuid", "X-REQUEST-UUID", "X_Request_UUID", "X-Request_UUID", "x_request-uuid", "X-Request-Stored", "X_REQUEST_STORED",
		"X-Request-Replay", "x_request_replay", "X-Request-Attempt", "X-Request_Attempt", "X-Request-Received-At", "x_request_received_at"} {
		field := name + ": 0190163d-8694-739b-aea5-966c26f8ad91"
		cases = append(cases,
			passes(name, head("GET /o HTTP/1.1", field, "X-Other: 1", field)),
			passes(name+", captured", sized("POST /o HTTP/1.1", "x", field)))
	}
	return append(cases,
		passes("in trailers", chunked("PUT /o HTTP/1.1", "1\r\nx\r\n0\r\nX-Request-UUID: a\r\nX-Sum: 1\r\nx_request_uuid: b\r\nX-Request-Attempt: 7\r\n\r\n")),
		passes("in trailers, not captured", chunked("REPORT /o HTTP/1.1", "1\r\nx\r\n0\r\nX-Request-UUID: a\r\nX-Sum: 1\r\nx_request_uuid: b\r\n\r\n")),
		passes("near misses", head("GET /o HTTP/1.1", "X-Request-UUID2: 1", "XRequest-UUID: 2", "X-Request-Id: 3", "X-Request-U-UID: 4")),
		passes("from the API", sized("POST /o HTTP/1.1", "x")).
			reply("HTTP/1.1 200 OK\r\nX-Request-UUID: api\r\nx_request_stored: no\r\nX-Request-Stored: no\r\nX-Other: 1\r\nContent-Length: 0\r\n\r\n"),
	)
}

func hopByHop() []Case {
	all := []string{"Connection: keep-alive, X-Named", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "TE: trailers, deflate", "Trailer: X-Sum",
		"Proxy-Authenticate: Basic", "Proxy-Authorization: Basic x", "X-Named: 1", "X-Kept: 2"}
	return []Case{
		passes("all", head("GET /c HTTP/1.1", all...)),
		passes("all, captured", sized("POST /c HTTP/1.1", "x", all...)),
		passes("named in other case", head("GET /c HTTP/1.1", "connection: x-NAMED,X-Too", "X-Named: 1", "x-too: 2", "X-Three: 3")),
		passes("named before", head("GET /c HTTP/1.1", "X-Named: 1", "X-Named: 2", "Connection: , X-Named ,,")),
		passes("named, several fields", head("GET /c HTTP/1.1", "Connection: X-A", "X-A: 1", "X-B: 2", "Connection: X-B")),
		passes("named, captured", sized("POST /c HTTP/1.1", "x", "Connection: X-Named", "X-Named: 1", "X-Kept: 2")),
		passes("names Host", head("GET /c HTTP/1.1", "Connection: Host")),
		passes("names Content-Length", sized("POST /c HTTP/1.1", "hello", "Connection: Content-Length")),
		passes("names Content-Length, not captured", sized("REPORT /c HTTP/1.1", "hello", "Connection: Content-Length")),
		passes("names Transfer-Encoding", chunked("POST /c HTTP/1.1", "5\r\nhello\r\n0\r\n\r\n", "Connection: Transfer-Encoding")),
		passes("names our own", head("GET /c HTTP/1.1", "Connection: X-Request-UUID, Via, X-Forwarded-For, X-Forwarded-Proto")),
		passes("names our own, captured", sized("POST /c HTTP/1.1", "x", "Connection: X-Request-UUID, Via, X-Forwarded-For")),
		passes("names what is not there", head("GET /c HTTP/1.1", "Connection: X-Absent")),
		passes("close", head("GET /c HTTP/1.1", "Connection: close")).want("200 close"),
		passes("close, captured", sized("POST /c HTTP/1.1", "x", "Connection: Close")).want("200 close"),
		passes("close among others", head("GET /c HTTP/1.1", "Connection: X-A, close", "X-A: 1")).want("200 close"),
		passes("close, then another request", head("GET /c HTTP/1.1", "Connection: close")+another).want("200 close"),
		passes("keep-alive", head("GET /c HTTP/1.1", "Connection: keep-alive")),
		passes("Proxy-Connection: close", head("GET /c HTTP/1.1", "Proxy-Connection: close")),
		passes("h2c is not passed", head("GET /c HTTP/1.1", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")),
		passes("h2c is not passed, captured", sized("POST /c HTTP/1.1", "x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")),
		passes("websocket is ignored on a captured method", sized("POST /c HTTP/1.1", "x", "Connection: Upgrade", "Upgrade: websocket")),
		passes("Upgrade that Connection does not name", head("GET /c HTTP/1.1", "Upgrade: websocket")),
		passes("from the API", head("GET /c HTTP/1.1")).
			reply("HTTP/1.1 200 OK\r\nConnection: X-Named\r\nX-Named: 1\r\nKeep-Alive: timeout=1\r\nProxy-Connection: x\r\nX-Kept: 1\r\nContent-Length: 0\r\n\r\n"),
		passes("from the API, captured", sized("POST /c HTTP/1.1", "x")).
			reply("HTTP/1.1 200 OK\r\nConnection: X-Named\r\nX-Named: 1\r\nKeep-Alive: timeout=1\r\nX-Kept: 1\r\nContent-Length: 0\r\n\r\n"),
	}
}

func bodies() (cases []Case) {
	// What the ingress captures it reads whole; the rest it streams.
	for what, m := range map[string]string{"captured": "POST", "streamed": "REPORT"} {
		start := m + " /b HTTP/1.1"
		cases = append(cases,
			passes("none, "+what, head(start)),
			passes("length 0, "+what, sized(start, "")),
			passes("length 5, "+what, sized(start, "hello")),
			passes("length with leading zeros, "+what, head(start, "Content-Length: 0005")+"hello"),
			passes("all bytes, "+what, sized(start, everyByte())),
			passes("64 KiB, "+what, sized(start, strings.Repeat("0123456789abcdef", 4<<10))),
			passes("1 MiB, "+what, sized(start, strings.Repeat("0123456789abcdef", 64<<10))),
			passes("looks like a request, "+what, sized(start, another)),
			passes("chunked, one, "+what, chunked(start, "5\r\nhello\r\n0\r\n\r\n")),
			passes("chunked, several, "+what, chunked(start, "1\r\nh\r\n2\r\nel\r\n02\r\nlo\r\n0\r\n\r\n")),
			passes("chunked, empty, "+what, chunked(start, "0\r\n\r\n")),
			passes("chunked, hex, "+what, chunked(start, "A\r\n0123456789\r\nb\r\n0123456789a\r\n1F\r\n"+strings.Repeat("f", 31)+"\r\n0\r\n\r\n")),
			passes("chunked, leading zeros, "+what, chunked(start, "0000000000000005\r\nhello\r\n000\r\n\r\n")),
			passes("chunked, extensions, "+what, chunked(start, "5;a\r\nhello\r\n1;b=c;d=\"e;f\"\r\n!\r\n0;last\r\n\r\n")),
			passes("chunked, trailers, "+what, chunked(start, "5\r\nhello\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\nX-Empty:\r\n\r\n", "Trailer: X-Sum")),
			passes("chunked, trailers of an empty body, "+what, chunked(start, "0\r\nX-Sum: 1\r\n\r\n")),
			passes("chunked, framing in trailers, "+what, chunked(start, "5\r\nhello\r\n0\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\nHost: other.test\r\nX-Sum: 1\r\n\r\n")),
			passes("chunked, 256 KiB in chunks of 4 KiB, "+what, chunked(start, strings.Repeat("1000\r\n"+strings.Repeat("c", 4<<10)+"\r\n", 64)+"0\r\n\r\n")),
			passes("chunked, all bytes, "+what, chunked(start, "100\r\n"+everyByte()+"\r\n0\r\n\r\n")),
			passes("chunked, looks like a request, "+what, chunked(start, fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(another), another))),
			passes("coding in other case, "+what, head(start, "transfer-encoding: ChunKed")+"5\r\nhello\r\n0\r\n\r\n"),
			passes("coding with spaces, "+what, head(start, "Transfer-Encoding:   chunked  ")+"5\r\nhello\r\n0\r\n\r\n"),
			passes("coding with tabs, "+what, head(start, "Transfer-Encoding: \t chunked \t")+"5\r\nhello\r\n0\r\n\r\n").nginx("nginx trims spaces, not tabs"),
			passes("content coding, "+what, sized(start, "\x1f\x8b\x08\x00", "Content-Encoding: gzip")),
		)
	}
	return append(cases, passes("GET, chunked", chunked("GET /b HTTP/1.1", "5\r\nhello\r\n0\r\n\r\n")))
}

func everyByte() string {
	b := make([]byte, 256)
	for i := range b {
		b[i] = byte(i)
	}
	return string(b)
}

func expectations() (cases []Case) {
	cases = append(cases, refused("too large, and is told before", "413", head("POST /e HTTP/1.1", "Expect: 100-continue", "Content-Length: 999999999999")))
	for what, m := range map[string]string{"captured": "POST", "streamed": "REPORT"} {
		start := m + " /e HTTP/1.1"
		waits := func(name, head string, then ...string) Case {
			return Case{Name: name + ", " + what, Send: head, Then: then, Want: "100 200 keep"}
		}
		cases = append(cases,
			waits("waits", head(start, "Expect: 100-continue", "Content-Length: 5"), "hello"),
			waits("waits, chunked", head(start, "Expect: 100-continue", "Transfer-Encoding: chunked"), "5\r\nhello\r\n0\r\n\r\n"),
			waits("waits, in other case", head(start, "expect: 100-Continue", "Content-Length: 5"), "hello"),
			passes("does not wait, "+what, sized(start, "hello", "Expect: 100-continue")),
			passes("no body, "+what, head(start, "Expect: 100-continue")),
			refused("something else, "+what, "417", sized(start, "hello", "Expect: tea")).nginx("nginx ignores what it does not know"),
			refused("something else besides, "+what, "417", sized(start, "hello", "Expect: 100-continue, tea")).nginx("as above"),
			passes("HTTP/1.0 knows none, "+what, sized(m+" /e HTTP/1.0", "hello", "Expect: 100-continue")).want("200 close"),
		)
	}
	return cases
}

func pipelines() []Case {
	get, post := head("GET /p HTTP/1.1"), sized("POST /p HTTP/1.1", "hello")
	chunks := chunked("PUT /p HTTP/1.1", "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n")
	bad := head("GET /p HTTP/1.1", "X-Bad : 1")
	return []Case{
		passes("two", get+get).want("200 200 keep"),
		passes("five", strings.Repeat(get, 5)).want("200 200 200 200 200 keep"),
		passes("two captured", post+post).want("200 200 keep"),
		passes("five captured", strings.Repeat(post, 5)).want("200 200 200 200 200 keep"),
		passes("mixed", get+post+chunks+get+post).want("200 200 200 200 200 keep"),
		passes("HEAD between", get+head("HEAD /p HTTP/1.1")+post).want("200 200h 200 keep"),
		passes("bodies of all framings", chunks+post+chunked("REPORT /p HTTP/1.1", "3\r\nabc\r\n0\r\n\r\n")+sized("REPORT /p HTTP/1.1", "def")).want("200 200 200 200 keep"),
		passes("empty line between", get+"\r\n"+post+"\r\n"+get).want("200 200 200 keep"),
		passes("close between", get+head("GET /p HTTP/1.1", "Connection: close")+get).want("200 200 close"),
		passes("bad one first", bad+get).want("!400 close"),
		passes("bad one between", get+bad+get).want("200 !400 close"),
		passes("bad one after a captured", post+bad+post).want("200 !400 close"),
		passes("both lengths between", get+head("POST /p HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked")+"0\r\n\r\n"+get).want("200 !400 close"),
		passes("garbage after", post+"garbage\r\n\r\n"+get).want("200 !400 close"),
		passes("garbage after a body", sized("POST /p HTTP/1.1", "hello")+"x"+post).want("200 200 keep").nginx("nginx knows no lower case in a method"),
	}
}

func oldClients() []Case {
	chunkedReply := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n"
	return []Case{
		passes("plain", head("GET /old HTTP/1.0")).want("200 close"),
		passes("without Host", raw("GET /old HTTP/1.0")).want("200 close"),
		passes("with a body", sized("POST /old HTTP/1.0", "hello")).want("200 close"),
		passes("streamed body", sized("REPORT /old HTTP/1.0", "hello")).want("200 close"),
		passes("keep-alive", head("GET /old HTTP/1.0", "Connection: keep-alive")),
		passes("keep-alive, captured", sized("POST /old HTTP/1.0", "hello", "Connection: Keep-Alive")),
		passes("HEAD", head("HEAD /old HTTP/1.0")).want("200h close"),
		passes("chunked answer", head("GET /old HTTP/1.0")).want("200 close").reply(chunkedReply),
		passes("chunked answer, captured", sized("POST /old HTTP/1.0", "x")).want("200 close").reply(chunkedReply),
		passes("chunked answer, keep-alive", head("GET /old HTTP/1.0", "Connection: keep-alive")).want("200 any").reply(chunkedReply),
		passes("interim answers are not for it", head("GET /old HTTP/1.0")).want("200 close").reply("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
		passes("absolute-form", head("GET http://api.test/old HTTP/1.0")).want("200 close"),
		passes("absolute-form, no Host", raw("GET http://api.test/old HTTP/1.0")).want("200 close"),
		passes("then another request", head("GET /old HTTP/1.0")+another).want("200 close"),
		passes("1.2 is taken for 1.1", head("GET /old HTTP/1.2")),
		refused("two Hosts", "400", head("GET /old HTTP/1.0", "Host: api.test")),
	}
}

func answers() (cases []Case) {
	for what, send := range map[string]string{"captured": sized("POST /a HTTP/1.1", "x"), "streamed": head("GET /a HTTP/1.1")} {
		for name, reply := range map[string]string{
			"201 with a reason of its own":    "HTTP/1.1 201 Made it so\r\nContent-Length: 2\r\n\r\nok",
			"200 without a reason":            "HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok",
			"299":                             "HTTP/1.1 299 Odd\r\nContent-Length: 0\r\n\r\n",
			"204":                             "HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
			"204 with a length":               "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
			"205":                             "HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n",
			"304":                             "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n",
			"304 with a length":               "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 1234\r\n\r\n",
			"302":                             "HTTP/1.1 302 Found\r\nLocation: //other.test/%2F?#x\r\nContent-Length: 0\r\n\r\n",
			"404":                             "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nno\n",
			"500":                             "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
			"503 with Retry-After":            "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n",
			"several cookies":                 "HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Path=/\r\nX-A: 1\r\nset-cookie: b=2, c\r\nSet-Cookie: a=1; Path=/\r\nContent-Length: 0\r\n\r\n",
			"order and spelling":              "HTTP/1.1 200 OK\r\nx-lower: 1\r\nX-UPPER: 2\r\nX-lOWER: 3\r\nserver: mine\r\nDATE: Sun, 01 Jan 2023 00:00:00 GMT\r\nX-Empty:\r\nContent-Length: 0\r\n\r\n",
			"obs-text":                        "HTTP/1.1 200 Tr\xe8s bien\r\nX-Latin: caf\xe9\r\nContent-Length: 0\r\n\r\n",
			"chunked":                         "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n",
			"chunked, empty":                  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
			"chunked, 200 KiB":                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1000\r\n"+strings.Repeat("c", 4<<10)+"\r\n", 50) + "0\r\n\r\n",
			"trailers":                        "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\nx-sum: 3\r\n\r\n",
			"trailers of an empty body":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Sum: 1\r\n\r\n",
			"103 before":                      "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nLink: </b.js>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			"102 and 103 before":              "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			"100 unasked":                     "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			"1 MiB":                           "HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n" + strings.Repeat("0123456789abcdef", 64<<10),
			"all bytes":                       "HTTP/1.1 200 OK\r\nContent-Length: 256\r\n\r\n" + everyByte(),
			"own Via":                         "HTTP/1.1 200 OK\r\nVia: 1.1 varnish, 1.1 other\r\nContent-Length: 0\r\n\r\n",
			"problem of the API":              "HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\nProxy-Status: other; error=x\r\nContent-Length: 2\r\n\r\n{}",
			"HTTP/1.0 with a length and kept": "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
		} {
			want := strings.Fields(reply)[1] + " keep"
			switch {
			case strings.HasPrefix(name, "102"):
				want = "102 103 200 keep"
			case strings.HasPrefix(name, "103"):
				want = "103 200 keep"
			case strings.HasPrefix(name, "100"):
				want = "200 keep"
			}
			cases = append(cases, passes(name+", "+what, send).want(want).reply(reply))
		}
		closes := func(name, reply string) Case {
			c := passes(name+", "+what, send)
			c.Reply = Reply{Raw: reply, Close: true}
			return c
		}
		cases = append(cases,
			closes("closed by the API", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"),
			closes("closed by the API, chunked", "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
			closes("until the end", "HTTP/1.1 200 OK\r\n\r\nuntil the end"),
			closes("until the end, HTTP/1.0", "HTTP/1.0 200 OK\r\nX-A: 1\r\n\r\nuntil the end"),
			closes("until the end, empty", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"),
		)
	}
	for name, reply := range map[string]string{
		"with a length":    "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n",
		"without a length": "HTTP/1.1 200 OK\r\nX-A: 1\r\n\r\n",
		"chunked":          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"404":              "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n",
	} {
		cases = append(cases, passes("HEAD, "+name, head("HEAD /a HTTP/1.1")).want(strings.Fields(reply)[1]+"h keep").reply(reply))
	}
	early := func(name, send, reply string, closes bool) Case {
		c := passes(name, send).want(strings.Fields(reply)[1] + " any")
		c.Reply = Reply{Raw: reply, Early: true, Close: closes}
		return c
	}
	const tooLarge = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\n\r\nlong"
	body := strings.Repeat("0123456789abcdef", 16<<10)
	return append(cases,
		early("413 before the body, captured", sized("POST /a HTTP/1.1", body), tooLarge, false),
		early("413 before the body, streamed", sized("REPORT /a HTTP/1.1", body), tooLarge, false),
		early("413 before the body, then closed, captured", sized("POST /a HTTP/1.1", body), "HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlong", true),
		early("200 before the body, chunked, captured", chunked("POST /a HTTP/1.1", "5\r\nhello\r\n0\r\n\r\n"), "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", false),
	)
}
