package wire_test

import (
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// answer is an answer, and what it is understood as.
type answer struct {
	name   string
	method string // GET when empty
	text   string
	want   message
}

// response begins what is expected of an answer 200 of HTTP/1.1.
func response(length int64, fields ...string) message {
	m := message{headed: true, response: wire.Response{Status: 200, Reason: "OK", Major: 1, Minor: 1, Length: length, Announced: -1}}
	for i := 0; i < len(fields); i += 2 {
		m.response.Fields = m.response.Fields.Add(fields[i], fields[i+1])
	}
	return m
}

func (m message) with(change func(m *message)) message {
	change(&m)
	return m
}

func answers() []answer {
	ok := func(fields ...string) string { return lines(append([]string{"HTTP/1.1 200 OK"}, fields...)...) }
	counted := func(length int64, close bool, fields ...string) message {
		return response(length, fields...).with(func(m *message) { m.response.Announced, m.response.Close = length, close })
	}
	untilClose := func(fields ...string) message {
		return response(wire.UntilClose, fields...).with(func(m *message) { m.response.Close = true })
	}
	status := func(status int, reason string) func(m *message) {
		return func(m *message) { m.response.Status, m.response.Reason = status, reason }
	}
	body := func(body string) func(m *message) { return func(m *message) { m.body = body } }
	rest := func(m *message) { m.rest = "next" }
	const (
		cl = "Content-Length"
		te = "Transfer-Encoding"
	)
	return []answer{
		{"a length", "", ok("Content-Length: 5") + "hellonext", counted(5, false, cl, "5").with(body("hello")).with(rest)},
		{"a length of 0", "", ok("Content-Length: 0") + "next", counted(0, false, cl, "0").with(rest)},
		{"until close", "", ok() + "hello", untilClose().with(body("hello"))},
		{"until close, and nothing comes", "", ok("Connection: keep-alive"), untilClose("Connection", "keep-alive")},
		{"chunks", "", ok("Transfer-Encoding: Chunked") + "5\r\nhello\r\n0\r\nA: b\r\n\r\nnext",
			response(wire.Chunked, te, "Chunked").with(body("hello")).with(rest).with(func(m *message) { m.trailer = m.trailer.Add("A", "b") })},
		{"chunks with spaces and LF", "", ok("Transfer-Encoding: chunked") + "5 \nhello\n0\t;x\nA : b\n\tc\n\nnext",
			response(wire.Chunked, te, "chunked").with(body("hello")).with(rest).with(func(m *message) { m.trailer = m.trailer.Add("A", "b c") })},
		{"both lengths", "", ok("Content-Length: 3", "Transfer-Encoding: chunked") + "1\r\nx\r\n0\r\n\r\nnext",
			response(wire.Chunked, cl, "3", te, "chunked").with(body("x")).with(rest).with(func(m *message) { m.response.Announced, m.response.Close = 3, true })},
		{"equal lengths", "", ok("Content-Length: 5", "content-length: 5") + "hello", counted(5, false, cl, "5", "content-length", "5").with(body("hello"))},
		{"a list of equal lengths", "", ok("Content-Length: 5 ,05") + "hello", counted(5, false, cl, "5 ,05").with(body("hello"))},
		{"LF alone", "", "HTTP/1.1 200 OK\nContent-Length: 1\n\nxnext", counted(1, false, cl, "1").with(body("x")).with(rest)},
		{"LF and CRLF", "", "HTTP/1.1 200 OK\nContent-Length: 1\r\n\nxnext", counted(1, false, cl, "1").with(body("x")).with(rest)},
		{"a space before the colon", "", ok("Content-Length \t: 1") + "x", counted(1, false, cl, "1").with(body("x"))},
		{"folded lines", "", ok("A: b", "\tc \t", "  d", "Content-Length: 0"), counted(0, false, "A", "b c d", cl, "0")},
		{"a folded line of nothing", "", ok("A: b", "  ", "Content-Length: 0"), counted(0, false, "A", "b", cl, "0")},
		{"a folded length", "", ok("Content-Length:", " 1") + "x", counted(1, false, cl, "1").with(body("x"))},
		{"a folded coding", "", ok("Transfer-Encoding: ", "\tchunked", "\t") + "0\r\n\r\n", response(wire.Chunked, te, "chunked")},
		{"Connection: close", "", ok("Content-Length: 0", "Connection: X-A, close"),
			counted(0, true, cl, "0", "Connection", "X-A, close").with(func(m *message) { m.response.Nominated = []string{"X-A"} })},
		{"HTTP/1.0", "", lines("HTTP/1.0 200 OK", "Content-Length: 0"), counted(0, true, cl, "0").with(func(m *message) { m.response.Minor = 0 })},
		{"HTTP/1.0 that keeps the connection", "", lines("HTTP/1.0 200 OK", "Content-Length: 0", "Connection: keep-alive"),
			counted(0, false, cl, "0", "Connection", "keep-alive").with(func(m *message) { m.response.Minor = 0 })},
		{"HTTP/1.9", "", lines("HTTP/1.9 200 OK", "Content-Length: 0"), counted(0, false, cl, "0")},
		{"no reason", "", lines("HTTP/1.1 200", "Content-Length: 0"), counted(0, false, cl, "0").with(status(200, ""))},
		{"an empty reason", "", lines("HTTP/1.1 200 ", "Content-Length: 0"), counted(0, false, cl, "0").with(status(200, ""))},
		{"a long reason", "", lines("HTTP/1.1 999 \xc3\xa4  b", "Content-Length: 0"), counted(0, false, cl, "0").with(status(999, "\xc3\xa4  b"))},
		{"an interim answer", "", lines("HTTP/1.1 103 Early Hints", "Link: a") + "next", response(0, "Link", "a").with(status(103, "Early Hints")).with(rest)},
		{"204 with lengths", "", lines("HTTP/1.1 204 No", "Transfer-Encoding: chunked") + "next", response(0, te, "chunked").with(status(204, "No")).with(rest)},
		{"304 with a length", "", lines("HTTP/1.1 304 Not", "Content-Length: 9") + "next",
			counted(0, false, cl, "9").with(status(304, "Not")).with(rest).with(func(m *message) { m.response.Announced = 9 })},
		{"HEAD with a length", "HEAD", ok("Content-Length: 9") + "next", counted(0, false, cl, "9").with(rest).with(func(m *message) { m.response.Announced = 9 })},
		{"HEAD with chunks", "HEAD", ok("Transfer-Encoding: chunked") + "next", response(0, te, "chunked").with(rest)},
		{"HEAD without length", "HEAD", ok() + "next", response(0).with(rest)},
	}
}

// of is the method of the request.
func (a *answer) of() string {
	if a.method == "" {
		return "GET"
	}
	return a.method
}

func TestAnswersThatAreTaken(t *testing.T) {
	for _, a := range answers() {
		t.Run(a.name, func(t *testing.T) {
			sameMessage(t, a.want, readResponse(whole(a.text), a.of(), 4<<10))
			sameMessage(t, a.want, readResponse(bytewise(a.text), a.of(), 1))
		})
	}
}

// badAnswers are no answers, each with a part of the reason.
var badAnswers = map[string]struct{ text, reason string }{
	"nothing":                        {"\r\n\r\n", "does not begin with HTTP/1.1"},
	"HTTP/2":                         {"HTTP/2 200 OK\r\n\r\n", "does not begin with HTTP/1.1"},
	"another protocol":               {"ICY 200 OK\r\n\r\n", "does not begin with HTTP/1.1"},
	"HTTP/1.x":                       {"HTTP/1.x 200 OK\r\n\r\n", "does not begin with HTTP/1.1"},
	"no status":                      {"HTTP/1.1\r\n\r\n", "no status"},
	"a status of two digits":         {"HTTP/1.1 20 OK\r\n\r\n", "no status"},
	"a status of four digits":        {"HTTP/1.1 2000\r\n\r\n", "no status"},
	"a status with a letter":         {"HTTP/1.1 2x0 OK\r\n\r\n", "no status"},
	"a status below 100":             {"HTTP/1.1 099 OK\r\n\r\n", "no status"},
	"a control character":            {"HTTP/1.1 200 O\x00K\r\n\r\n", "reason phrase"},
	"a bare CR in the reason":        {"HTTP/1.1 200 O\rK\r\n\r\n", "reason phrase"},
	"a line without colon":           {"HTTP/1.1 200 OK\r\nA\r\n\r\n", "no colon"},
	"a folded first line":            {"HTTP/1.1 200 OK\r\n A: b\r\n\r\n", "white space"},
	"an empty name":                  {"HTTP/1.1 200 OK\r\n : b\r\n\r\n", "white space"},
	"a name with a space":            {"HTTP/1.1 200 OK\r\nA b: c\r\n\r\n", "a field name"},
	"NUL in a value":                 {"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n", "control character"},
	"a bare CR in a value":           {"HTTP/1.1 200 OK\r\nA: b\rContent-Length: 0\r\n\r\n", "control character"},
	"NUL in a folded line":           {"HTTP/1.1 200 OK\r\nA: b\r\n \x00\r\n\r\n", "control character"},
	"different lengths":              {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", "not one number"},
	"a list of different lengths":    {"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n", "not one number"},
	"a negative length":              {"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "not one number"},
	"an empty length":                {"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n", "not one number"},
	"a length in a folded line":      {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n 5\r\n\r\n", "not one number"},
	"gzip":                           {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "not exactly chunked"},
	"gzip, chunked":                  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "not exactly chunked"},
	"chunked twice":                  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", "not exactly chunked"},
	"a coding over HTTP/1.0":         {"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.0"},
	"a chunk size that is no number": {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "hexadecimal"},
	"a chunk that is longer":         {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\n", "longer"},
	"a chunk size that is too large": {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n", "too large"},
	"a head that is too large":       {"HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", headLimit) + "\r\n\r\n", "too large"},
	"trailers that are too large":    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: " + strings.Repeat("x", headLimit) + "\r\n\r\n", "trailer section"},
	"too many fields":                {"HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", fieldLimit+1) + "\r\n", "more fields"},
}

func TestAnswersThatAreRefused(t *testing.T) {
	for name, c := range badAnswers {
		t.Run(name, func(t *testing.T) {
			m := readResponse(whole(c.text), "GET", 4<<10)
			require.ErrorContains(t, m.err, c.reason)
			sameMessage(t, m, readResponse(bytewise(c.text), "GET", 1))
		})
	}
}

func TestAnswersInEveryFragmentation(t *testing.T) {
	all := answers()
	for _, c := range badAnswers {
		all = append(all, answer{text: c.text})
	}
	rapid.Check(t, func(t *rapid.T) {
		a := all[rapid.IntRange(0, len(all)-1).Draw(t, "answer")]
		want := readResponse(whole(a.text), a.of(), 32<<10)
		sameMessage(t, want, readResponse(split(t, a.text), a.of(), rapid.IntRange(1, 9000).Draw(t, "read")))
	})
}

// An answer that ends early is whole only where the end of the connection is its
// end.
func TestAnswersThatEndEarly(t *testing.T) {
	for _, a := range answers() {
		all := len(a.text) - len(a.want.rest)
		for end := range all {
			m := readResponse(whole(a.text[:end]), a.of(), 4<<10)
			switch {
			case end == 0:
				require.Equal(t, io.EOF, m.err, a.name)
			case a.want.response.Length == wire.UntilClose && strings.Contains(a.text[:end], "\r\n\r\n"):
				require.NoError(t, m.err, "%s, %d bytes", a.name, end)
			default:
				require.Equal(t, io.ErrUnexpectedEOF, m.err, "%s, %d bytes", a.name, end)
			}
		}
	}
}

func TestResponseHoldsNothingOfTheOneBefore(t *testing.T) {
	var resp wire.Response
	first := "HTTP/1.0 500 No\r\nConnection: close, X-A\r\nContent-Length: 3\r\n\r\n"
	require.NoError(t, wire.ReadResponse(wire.NewReader(whole(first)), &resp, "GET", headLimit, fieldLimit))
	require.NoError(t, wire.ReadResponse(wire.NewReader(whole("HTTP/1.1 204\r\n\r\n")), &resp, "GET", headLimit, fieldLimit))
	require.Equal(t, wire.Response{Status: 204, Major: 1, Minor: 1, Announced: -1, Fields: resp.Fields[:0], Nominated: resp.Nominated[:0]}, resp)
}
