package wire_test

import (
	"io"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// refusal is a request that is not taken.
type refusal struct {
	name   string
	text   string
	status int
	reason string // a part of it
}

// refusals has every reason, and every shape of it that matters.
func refusals() []refusal {
	const (
		lf        = "a line ends in LF without CR"
		begin     = "does not begin with a method"
		noTarget  = "has no target or no version"
		target    = "the target holds a space"
		version   = "does not end in a version"
		colon     = "has no colon"
		folded    = "begins with white space"
		space     = "followed by white space"
		name      = "a field name is empty or holds"
		control   = "a field value holds a control character"
		host      = "not a host with an optional port"
		length    = "Content-Length is not one number"
		notURL    = "neither a path nor an http URL"
		exactly   = "not exactly chunked"
		hexNumber = "not a hexadecimal number"
		other     = "another host than the Host field"
	)
	rs := []refusal{
		{"bare LF after the request line", "GET / HTTP/1.1\nHost: a\r\n\r\n", 400, lf},
		{"bare LF after a field", "GET / HTTP/1.1\r\nHost: a\n\r\n", 400, lf},
		{"bare LF for the empty line", "GET / HTTP/1.1\r\nHost: a\r\n\n", 400, lf},
		{"bare LF before the request line", "\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400, lf},
		{"two empty lines", "\r\n\r\n" + get(), 400, begin},
		{"bare CR in the request line", "GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", 400, target},
		{"bare CR before the end", "GET / HTTP/1.1\r\r\nHost: a\r\n\r\n", 400, version},
		{"no method", lines(" / HTTP/1.1", "Host: a"), 400, begin},
		{"a method that is no token", lines("G@T / HTTP/1.1", "Host: a"), 400, begin},
		{"a method with NUL", lines("G\x00T / HTTP/1.1", "Host: a"), 400, begin},
		{"a tab for a space", lines("GET\t/\tHTTP/1.1", "Host: a"), 400, begin},
		{"HTTP/0.9", lines("GET /"), 400, noTarget},
		{"two spaces before the target", lines("GET  / HTTP/1.1", "Host: a"), 400, target},
		{"two spaces after the target", lines("GET /  HTTP/1.1", "Host: a"), 400, target},
		{"no target", lines("GET  HTTP/1.1", "Host: a"), 400, noTarget},
		{"a space in the target", lines("GET /a b HTTP/1.1", "Host: a"), 400, target},
		{"a fragment", lines("GET /a#b HTTP/1.1", "Host: a"), 400, target},
		{"NUL in the target", lines("GET /\x00 HTTP/1.1", "Host: a"), 400, target},
		{"DEL in the target", lines("GET /\x7f HTTP/1.1", "Host: a"), 400, target},
		{"a space at the end", lines("GET / HTTP/1.1 ", "Host: a"), 400, target},
		{"lower case version", lines("GET / http/1.1", "Host: a"), 400, version},
		{"a version without minor", lines("GET / HTTP/1", "Host: a"), 400, version},
		{"a version with two digits", lines("GET / HTTP/1.10", "Host: a"), 400, version},
		{"a version with letters", lines("GET / HTTP/1.x", "Host: a"), 400, version},
		{"another protocol", lines("GET / ICAP/1.1", "Host: a"), 400, version},
		{"HTTP/2.0", lines("PRI * HTTP/2.0"), 505, "this version"},
		{"HTTP/0.9 by name", lines("GET / HTTP/0.9", "Host: a"), 505, "this version"},
		{"HTTP/3.0", lines("GET / HTTP/3.0", "Host: a"), 505, "this version"},
		{"a line without colon", get("abc"), 400, colon},
		{"a folded line", get("A: b", " c"), 400, folded},
		{"a folded line with a tab", get("A: b", "\tc"), 400, folded},
		{"a folded first line", lines("GET / HTTP/1.1", " Host: a"), 400, folded},
		{"a line of spaces", get("A: b", "  "), 400, folded},
		{"a space before the colon", get("A : b"), 400, space},
		{"a tab before the colon", get("A\t: b"), 400, space},
		{"an empty name", get(": b"), 400, name},
		{"a name with a space", get("A b: c"), 400, name},
		{"a name with NUL", get("A\x00: c"), 400, name},
		{"a name beyond ASCII", get("\xc3\x84: c"), 400, name},
		{"a name with a slash", get("A/B: c"), 400, name},
		{"NUL in a value", get("A: b\x00c"), 400, control},
		{"CR in a value", get("A: b\rc"), 400, control},
		{"CR at the end of a value", get("A: b\r"), 400, control},
		{"DEL in a value", get("A: \x7f"), 400, control},
		{"ESC in a value", get("A: \x1b[2J"), 400, control},
		{"a vertical tab in a value", get("A: \v"), 400, control},
		{"no Host", lines("GET / HTTP/1.1"), 400, "no Host field"},
		{"two Hosts", get("Host: a"), 400, "more than one Host"},
		{"two Hosts of which one is empty", lines("GET / HTTP/1.1", "Host:", "Host: a"), 400, "more than one Host"},
		{"two Hosts over HTTP/1.0", lines("GET / HTTP/1.0", "Host: a", "hOST: a"), 400, "more than one Host"},
		{"a Host with a path", lines("GET / HTTP/1.1", "Host: a/b"), 400, host},
		{"a Host with a user", lines("GET / HTTP/1.1", "Host: u@a"), 400, host},
		{"a Host with a space", lines("GET / HTTP/1.1", "Host: a b"), 400, host},
		{"a Host over HTTP/1.0", lines("GET / HTTP/1.0", "Host: a b"), 400, host},
		{"a list of Hosts", lines("GET / HTTP/1.1", "Host: a, b"), 400, host},
		{"two lengths", get("Content-Length: 5", "Content-Length: 6"), 400, "more than one Content-Length"},
		{"two equal lengths", get("Content-Length: 5", "content-length: 5"), 400, "more than one Content-Length"},
		{"both lengths", get("Content-Length: 5", "Transfer-Encoding: chunked"), 400, "both Content-Length and Transfer-Encoding"},
		{"both lengths, the other way", get("Transfer-Encoding: chunked", "Content-Length: 0"), 400, "both Content-Length and Transfer-Encoding"},
		{"an unknown coding and a length", get("Transfer-Encoding: x", "Content-Length: 0"), 400, "both Content-Length and Transfer-Encoding"},
		{"two codings", get("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400, "more than one Transfer-Encoding"},
		{"a coding over HTTP/1.0", lines("POST / HTTP/1.0", "Transfer-Encoding: chunked"), 400, "HTTP/1.0 has no Transfer-Encoding"},
		{"chunked twice", get("Transfer-Encoding: chunked, chunked"), 400, exactly},
		{"gzip, chunked", get("Transfer-Encoding: gzip, chunked"), 400, exactly},
		{"chunked, identity", get("Transfer-Encoding: chunked, identity"), 400, exactly},
		{"chunked and a comma", get("Transfer-Encoding: chunked,"), 400, exactly},
		{"gzip", get("Transfer-Encoding: gzip"), 501, "not known here"},
		{"identity", get("Transfer-Encoding: identity"), 501, "not known here"},
		{"xchunked", get("Transfer-Encoding: xchunked"), 501, "not known here"},
		{"chunked with a Kelvin sign", get("Transfer-Encoding: chun\u212aed"), 501, "not known here"},
		{"an empty coding", get("Transfer-Encoding:"), 501, "not known here"},
		{"a parameter of the coding", get("Transfer-Encoding: chunked;q=1"), 501, "not known here"},
		{"an expectation", get("Expect: 200-ok"), 417, "no expectation"},
		{"a list of expectations", get("Expect: 100-continue, x"), 417, "no expectation"},
		{"CONNECT", lines("CONNECT a:80 HTTP/1.1", "Host: a:80"), 400, "CONNECT is not taken"},
		{"CONNECT with a path", lines("CONNECT / HTTP/1.1", "Host: a"), 400, "CONNECT is not taken"},
		{"GET *", lines("GET * HTTP/1.1", "Host: a"), 400, "belongs to OPTIONS"},
		{"a target without slash", lines("GET a HTTP/1.1", "Host: a"), 400, notURL},
		{"an authority", lines("GET a:80 HTTP/1.1", "Host: a:80"), 400, notURL},
		{"another scheme", lines("GET ftp://a/ HTTP/1.1", "Host: a"), 400, notURL},
		{"a scheme without slashes", lines("GET http:/a HTTP/1.1", "Host: a"), 400, notURL},
		{"a URL without host", lines("GET http:///x HTTP/1.1", "Host:"), 400, "names no host"},
		{"a URL with a user", lines("GET http://u@a/ HTTP/1.1", "Host: a"), 400, "names no host"},
		{"a URL with a backslash", lines("GET http://a\\b/ HTTP/1.1", "Host: a"), 400, "names no host"},
		{"another host", lines("GET http://b/ HTTP/1.1", "Host: a"), 400, other},
		{"another port", lines("GET http://a:80/ HTTP/1.1", "Host: a"), 400, other},
		{"an empty Host", lines("GET http://a/ HTTP/1.1", "Host:"), 400, other},
		{"another host over HTTP/1.0", lines("GET http://b/ HTTP/1.0", "Host: a"), 400, other},
		{"a head that is too large", get("A: " + strings.Repeat("x", headLimit)), 431, "more than the 65536 bytes"},
		{"a line that does not end", "GET /" + strings.Repeat("x", headLimit), 431, "more than the 65536 bytes"},
		{"too many fields", get(strings.Split(strings.Repeat("A:\n", fieldLimit), "\n")[:fieldLimit]...), 431, "more fields than are allowed"},

		{"no chunk size", post("\r\n"), 400, hexNumber},
		{"a chunk size with 0x", post("0x5\r\nhello\r\n0\r\n\r\n"), 400, hexNumber},
		{"a chunk size with a sign", post("+5\r\nhello\r\n0\r\n\r\n"), 400, hexNumber},
		{"a negative chunk size", post("-1\r\n"), 400, hexNumber},
		{"a space before a chunk size", post(" 5\r\nhello\r\n0\r\n\r\n"), 400, hexNumber},
		{"a space after a chunk size", post("5 \r\nhello\r\n0\r\n\r\n"), 400, hexNumber},
		{"a space before an extension", post("5 ;a\r\nhello\r\n0\r\n\r\n"), 400, hexNumber},
		{"a comma in a chunk size", post("5,5\r\nhello\r\n0\r\n\r\n"), 400, hexNumber},
		{"an underscore in a chunk size", post("1_0\r\n"), 400, hexNumber},
		{"a chunk size of 17 digits", post("00000000000000005\r\nhello\r\n0\r\n\r\n"), 400, "too large"},
		{"a chunk size of 2^63", post("8000000000000000\r\n"), 400, "too large"},
		{"a chunk size of 2^64-1", post("ffffffffffffffff\r\n"), 400, "too large"},
		{"bare LF after a chunk size", post("5\nhello\r\n0\r\n\r\n"), 400, "ends in LF"},
		{"bare CR in a chunk size", post("5\rx\r\nhello\r\n0\r\n\r\n"), 400, hexNumber},
		{"bare LF after a chunk", post("5\r\nhello\n0\r\n\r\n"), 400, "ends in LF"},
		{"bare LF after the last chunk", post("0\n\r\n"), 400, "ends in LF"},
		{"bare LF for the trailer section", post("0\r\n\n"), 400, lf},
		{"a chunk that is longer than its size", post("2\r\nhello\r\n0\r\n\r\n"), 400, "too long"},
		{"a chunk that is a byte longer", post("4\r\nhell.\r\n0\r\n\r\n"), 400, "longer than it says"},
		{"a control character in an extension", post("5;a\x00\r\nhello\r\n0\r\n\r\n"), 400, "extension holds a control"},
		{"a bare CR in an extension", post("5;a\rb\r\nhello\r\n0\r\n\r\n"), 400, "extension holds a control"},
		{"an extension that is too long", post("5;" + strings.Repeat("a", 5000) + "\r\nhello\r\n0\r\n\r\n"), 400, "too long"},
		{"an extension that does not end", post("5;" + strings.Repeat("a", 5000)), 400, "too long"},
		{"too many extensions", post(strings.Repeat("1;"+strings.Repeat("a", 4000)+"\r\nx\r\n", 20)), 400, "too many extensions"},
		{"a folded trailer", post("0\r\nA: b\r\n c\r\n\r\n"), 400, folded},
		{"a trailer without colon", post("0\r\nA\r\n\r\n"), 400, colon},
		{"a trailer with NUL", post("0\r\nA: \x00\r\n\r\n"), 400, control},
		{"too many trailers", post("0\r\n" + strings.Repeat("A: b\r\n", fieldLimit+1) + "\r\n"), 431, "more fields than are allowed"},
		{"trailers that are too large", post("0\r\nA: " + strings.Repeat("x", headLimit) + "\r\n\r\n"), 431, "trailer section has more than the 65536 bytes"},
	}
	for _, value := range []string{"5, 5", "5,", "+5", "-5", "0x5", "5.0", "5 5", "\u0665", "1e3", "5;", "\"5\"", "", strings.Repeat("9", 19)} {
		rs = append(rs, refusal{"a length of " + strconv.Quote(value), get("Content-Length: " + value), 400, length})
	}
	return rs
}

func TestRequestsThatAreRefused(t *testing.T) {
	for _, r := range refusals() {
		t.Run(r.name, func(t *testing.T) {
			m := readRequest(whole(r.text), 4<<10)
			require.ErrorContains(t, m.err, r.reason)
			require.Equal(t, r.status, m.status)
			sameMessage(t, m, readRequest(bytewise(r.text), 1))
		})
	}
}

// taken is a request that is understood.
type taken struct {
	name string
	text string
	want func(m *message) // what is not a plain GET of / from a
}

func takens() []taken {
	field := func(line string) taken {
		return taken{line, get(line), func(m *message) {
			name, value, _ := strings.Cut(line, ":")
			m.request.Fields = m.request.Fields.Add(name, strings.Trim(value, " \t"))
		}}
	}
	target := func(target string) taken {
		return taken{target, lines("GET "+target+" HTTP/1.1", "Host: a"), func(m *message) { m.request.Target = target }}
	}
	chunked := func(name, coded, body string, trailer ...string) taken {
		return taken{name, post(coded), func(m *message) {
			m.request.Method, m.request.Length, m.body = "POST", wire.Chunked, body
			m.request.Fields = m.request.Fields.Add("Transfer-Encoding", "chunked")
			for i := 0; i < len(trailer); i += 2 {
				m.trailer = m.trailer.Add(trailer[i], trailer[i+1])
			}
		}}
	}
	version := func(v string, minor int, fields ...string) taken {
		return taken{v, lines(append([]string{"GET / " + v, "Host: a"}, fields...)...), func(m *message) {
			m.request.Minor, m.request.Close = minor, minor == 0
			for _, line := range fields {
				name, value, _ := strings.Cut(line, ": ")
				m.request.Fields = m.request.Fields.Add(name, value)
			}
		}}
	}
	with := func(line string, also func(r *wire.Request)) taken {
		tk := field(line)
		plain := tk.want
		tk.want = func(m *message) { plain(m); also(&m.request) }
		return tk
	}
	return []taken{
		{"plain", get(), func(*message) {}},
		{"an empty line before it", "\r\n" + get(), func(*message) {}},
		target("/%2F//a/../?b=c?&|\"<>\\^`{}"), target("/%zz?"), target("//a"), target("/\x80\xff"), target("/?#"[:2]),
		version("HTTP/1.0", 0), version("HTTP/1.2", 1), version("HTTP/1.9", 1),
		{"HTTP/1.0 that keeps the connection", lines("GET / HTTP/1.0", "Connection: Keep-Alive"), func(m *message) {
			m.request.Minor, m.request.Host, m.request.Fields = 0, "", wire.Fields{}.Add("Connection", "Keep-Alive")
		}},
		{"HTTP/1.0 that expects", lines("GET / HTTP/1.0", "Expect: 100-continue"), func(m *message) {
			m.request.Minor, m.request.Host, m.request.Close = 0, "", true
			m.request.Fields = wire.Fields{}.Add("Expect", "100-continue")
		}},
		{"an empty Host", lines("GET / HTTP/1.1", "Host:"), func(m *message) { m.request.Host, m.request.Fields = "", wire.Fields{}.Add("Host", "") }},
		{"another method", lines("m!#$%&'*+-.^_`|~9 / HTTP/1.1", "Host: a"), func(m *message) { m.request.Method = "m!#$%&'*+-.^_`|~9" }},
		{"OPTIONS *", lines("OPTIONS * HTTP/1.1", "Host: a"), func(m *message) { m.request.Method, m.request.Target = "OPTIONS", "*" }},
		{"a URL", lines("GET http://a/b?c HTTP/1.1", "Host: a"), func(m *message) { m.request.Target = "/b?c" }},
		{"a URL in capitals", lines("GET HTTPS://A/b HTTP/1.1", "Host: a"), func(m *message) { m.request.Target = "/b" }},
		{"a URL without path", lines("GET http://a HTTP/1.1", "Host: a"), func(*message) {}},
		{"a URL with a query alone", lines("GET http://a?b/c HTTP/1.1", "Host: a"), func(m *message) { m.request.Target = "/?b/c" }},
		{"OPTIONS of a URL without path", lines("OPTIONS http://a HTTP/1.1", "Host: a"), func(m *message) { m.request.Method, m.request.Target = "OPTIONS", "*" }},
		{"a URL over HTTP/1.0 without Host", lines("GET http://a/ HTTP/1.0"), func(m *message) { m.request.Minor, m.request.Fields, m.request.Close = 0, nil, true }},
		field("x-LOWER: v"), field("X:"), field("X: \t a b\tc \t"), field("X:a:b"), field("X: \x80\xff"), field("x_under: 1"),
		with("Connection: close", func(r *wire.Request) { r.Close = true }),
		with("Connection: , CLOSE ,keep-alive", func(r *wire.Request) { r.Close = true }),
		with("Connection: X-A, , upgrade, Host", func(r *wire.Request) { r.Nominated = []string{"X-A", "Host"} }),
		field("Upgrade: websocket"),
		{"an upgrade", get("Upgrade: a", "Connection: UPGRADE", "upgrade: b"), func(m *message) {
			m.request.Upgrade = "a, b"
			m.request.Fields = m.request.Fields.Add("Upgrade", "a").Add("Connection", "UPGRADE").Add("upgrade", "b")
		}},
		with("Expect: 100-Continue", func(r *wire.Request) { r.Expect = true }),
		{"a length", get("content-LENGTH: 0005") + "hello", func(m *message) {
			m.request.Length, m.body = 5, "hello"
			m.request.Fields = m.request.Fields.Add("content-LENGTH", "0005")
		}},
		with("Content-Length: 0", func(*wire.Request) {}),
		with("Content-Length: 00000000000000000000000000", func(*wire.Request) {}),
		{"capitals in the coding", lines("GET / HTTP/1.1", "Host: a", "Transfer-Encoding: CHUNKED") + "0\r\n\r\n", func(m *message) {
			m.request.Length = wire.Chunked
			m.request.Fields = m.request.Fields.Add("Transfer-Encoding", "CHUNKED")
		}},
		chunked("nothing in chunks", "0\r\n\r\n", ""),
		chunked("chunks", "5\r\nhello\r\n00A\r\n, world...\r\n0\r\n\r\n", "hello, world..."),
		chunked("a chunk size of 16 digits", "0000000000000001\r\nx\r\n0000000000000000\r\n\r\n", "x"),
		chunked("chunks that look like framing", "5\r\n0\r\n\r\n\r\n0\r\n\r\n", "0\r\n\r\n"),
		chunked("extensions", "1;a=\"b;c\" \t\r\nx\r\n0;z\r\n\r\n", "x"),
		chunked("trailers", "1\r\nx\r\n0\r\nA: b\r\nc:\r\nA: d\r\n\r\n", "x", "A", "b", "c", "", "A", "d"),
	}
}

// plain is what a taken request changes.
func plain() message {
	return message{headed: true, request: wire.Request{
		Method: "GET", Target: "/", Major: 1, Minor: 1, Host: "a", Fields: wire.Fields{}.Add("Host", "a"),
	}}
}

func TestRequestsThatAreTaken(t *testing.T) {
	for _, tk := range takens() {
		t.Run(tk.name, func(t *testing.T) {
			want := plain()
			tk.want(&want)
			want.rest = "POST /next"
			sameMessage(t, want, readRequest(whole(tk.text+"POST /next"), 4<<10))
			sameMessage(t, want, readRequest(bytewise(tk.text+"POST /next"), 1))
		})
	}
}

// However the bytes come, and whatever is read at a time, the result is one.
func TestRequestsInEveryFragmentation(t *testing.T) {
	var texts []string
	for _, tk := range takens() {
		texts = append(texts, tk.text+"next")
	}
	for _, r := range refusals() {
		texts = append(texts, r.text)
	}
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.SampledFrom(texts).Draw(t, "text")
		want := readRequest(whole(text), 32<<10)
		sameMessage(t, want, readRequest(split(t, text), rapid.IntRange(1, 9000).Draw(t, "read")))
	})
}

// A request that ends early is never a whole one, and never refused as wrong.
func TestRequestsThatEndEarly(t *testing.T) {
	for _, tk := range takens() {
		for end := range len(tk.text) {
			m := readRequest(whole(tk.text[:end]), 4<<10)
			if end == 0 || tk.text[:end] == "\r\n" {
				require.Equal(t, io.EOF, m.err, "%s, %d bytes", tk.name, end)
				continue
			}
			require.Equal(t, io.ErrUnexpectedEOF, m.err, "%s, %d bytes", tk.name, end)
		}
	}
}

// A TLS connection gives its end together with the last bytes.
func TestChunkedBodyThatEndsWithAChunkIsNotWhole(t *testing.T) {
	for _, size := range []int{1, 16, 4096, 8192, 20000} {
		text := post(strconv.FormatInt(int64(size), 16) + "\r\n" + strings.Repeat("x", size))
		for _, first := range []int{len(text), len(text) - size, len(text) - 1} {
			m := readRequest(&pieces{text: text, sizes: []int{first}, end: io.EOF, together: true}, 32<<10)
			require.Equal(t, io.ErrUnexpectedEOF, m.err, "%d bytes, %d at first", size, first)
			require.Len(t, m.body, size)
		}
	}
}

// The end that comes with the last bytes of a counted body is only its end.
func TestCountedBodyWithTheEndOfTheConnection(t *testing.T) {
	text := get("Content-Length: 20000") + strings.Repeat("x", 20000)
	m := readRequest(&pieces{text: text, sizes: []int{len(text) - 20000}, end: io.ErrClosedPipe, together: true}, 32<<10)
	require.NoError(t, clean(m.err))
	require.Len(t, m.body, 20000)
}

// clean is the error of a body that did not come whole.
func clean(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

func TestHeadLimits(t *testing.T) {
	var req wire.Request
	for _, limit := range []int{40, 4095, 4096, 4097, 8192, 10000} {
		text := get("A: ")
		text = get("A: " + strings.Repeat("x", limit-len(text)))
		require.Len(t, text, limit)
		for _, src := range []func(string) io.Reader{whole, bytewise} {
			require.NoError(t, wire.ReadRequest(wire.NewReader(src(text+"rest")), &req, limit, 2))
			require.NoError(t, wire.ReadRequest(wire.NewReader(src("\r\n"+text)), &req, limit, 2), "the empty line is not of it")
			err := wire.ReadRequest(wire.NewReader(src(text)), &req, limit-1, 2)
			require.ErrorContains(t, err, "more than the "+strconv.Itoa(limit-1)+" bytes")
			require.ErrorContains(t, wire.ReadRequest(wire.NewReader(src(text)), &req, limit, 1), "more fields")
		}
	}
}

// Nothing of a request may be taken for the next one on its connection.
func TestRequestHoldsNothingOfTheOneBefore(t *testing.T) {
	var req wire.Request
	full := lines("HEAD http://a/x HTTP/1.1", "Host: a", "Connection: close, upgrade, x", "Upgrade: b", "Expect: 100-continue", "Content-Length: 3")
	for name, next := range map[string]string{
		"nothing":   "",
		"a part":    "GET / HT",
		"a refusal": "G@T / HTTP/1.1\r\n\r\n",
		"too large": strings.Repeat("x", 300),
	} {
		require.NoError(t, wire.ReadRequest(wire.NewReader(whole(full)), &req, 200, fieldLimit))
		require.NotEmpty(t, req.Nominated)
		require.Error(t, wire.ReadRequest(wire.NewReader(whole(next)), &req, 200, fieldLimit), name)
		require.Equal(t, wire.Request{Fields: req.Fields[:0], Nominated: req.Nominated[:0]}, req, name)
	}
	require.NoError(t, wire.ReadRequest(wire.NewReader(whole(full)), &req, headLimit, fieldLimit))
	require.NoError(t, wire.ReadRequest(wire.NewReader(whole(get())), &req, headLimit, fieldLimit))
	want := plain().request
	want.Nominated = req.Nominated[:0]
	require.Equal(t, want, req)
}

// Of a head that is refused for its fields the request line is known.
func TestRefusedRequestTellsItsMethod(t *testing.T) {
	m := readRequest(whole(lines("HEAD /x HTTP/1.1", "Host: a", "bad")), 1)
	require.Error(t, m.err)
	require.Equal(t, "HEAD", m.request.Method)
	require.Equal(t, "/x", m.request.Target)
}

// stalls fails the test that reads beyond the text.
type stalls struct {
	t    *testing.T
	text string
}

func (s *stalls) Read(b []byte) (int, error) {
	if s.text == "" {
		s.t.Error("it was read beyond what is here")
		return 0, io.ErrUnexpectedEOF
	}
	n := copy(b, s.text)
	s.text = s.text[n:]
	return n, nil
}

// What is here is given before anything more is waited for.
func TestBodyGivesWhatIsHere(t *testing.T) {
	buf := make([]byte, 64)
	for name, c := range map[string]struct {
		text string
		body string
		err  error
	}{
		"a counted body, whole":         {get("Content-Length: 5") + "hello", "hello", io.EOF},
		"a counted body, in part":       {get("Content-Length: 9") + "hello", "hello", nil},
		"a chunk":                       {post("5\r\nhello"), "hello", nil},
		"a chunk in part":               {post("9\r\nhello"), "hello", nil},
		"half of the end of a chunk":    {post("5\r\nhello\r"), "hello", nil},
		"the end of a chunk":            {post("5\r\nhello\r\n"), "hello", nil},
		"a part of the next size":       {post("5\r\nhello\r\n5"), "hello", nil},
		"the next size":                 {post("5\r\nhello\r\n5\r\n"), "hello", nil},
		"two chunks":                    {post("5\r\nhello\r\n1\r\n!"), "hello!", nil},
		"the last size":                 {post("5\r\nhello\r\n0\r\n"), "hello", nil},
		"half of the last line":         {post("5\r\nhello\r\n0\r\n\r"), "hello", nil},
		"the end":                       {post("5\r\nhello\r\n0\r\n\r\n"), "hello", io.EOF},
		"one of two trailers":           {post("5\r\nhello\r\n0\r\nA: b\r\nC"), "hello", nil},
		"trailers without their end":    {post("5\r\nhello\r\n0\r\nA: b\r\n"), "hello", nil},
		"trailers":                      {post("5\r\nhello\r\n0\r\nA: b\r\n\r\n"), "hello", io.EOF},
		"an empty chunk in another one": {post("5\r\nhello\r\n0;\r\n"), "hello", nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := wire.NewReader(&stalls{t, c.text})
			var req wire.Request
			require.NoError(t, wire.ReadRequest(r, &req, headLimit, fieldLimit))
			var b wire.Body
			b.Reset(r, req.Length, headLimit, fieldLimit, false)
			n, err := b.Read(buf)
			require.Equal(t, c.body, string(buf[:n]))
			require.Equal(t, c.err, err)
		})
	}
}

func TestBodyTellsWhatIsLeft(t *testing.T) {
	r := wire.NewReader(whole("hello"))
	var b wire.Body
	require.True(t, b.Done(), "the zero value is an empty body")
	_, err := b.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)
	b.Reset(r, 5, headLimit, fieldLimit, false)
	require.EqualValues(t, 5, b.Left())
	_, err = b.Read(nil)
	require.NoError(t, err)
	_, err = b.Read(make([]byte, 2))
	require.NoError(t, err)
	require.EqualValues(t, 3, b.Left())
	require.False(t, b.Done())
	b.Reset(r, wire.Chunked, headLimit, fieldLimit, false)
	require.EqualValues(t, -1, b.Left())
	b.Reset(r, wire.UntilClose, headLimit, fieldLimit, true)
	rest, err := io.ReadAll(&b)
	require.NoError(t, err)
	require.Equal(t, "llo", string(rest))
	require.Zero(t, b.Left())
}
