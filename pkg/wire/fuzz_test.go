package wire_test

import (
	"bufio"
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// likeNetHTTP demands that net/http understands what was taken of text in the same
// way, except where its own rules are narrower:
//   - targets that url.Parse refuses, and values of the Trailer field that name
//     framing, are not known to it;
//   - it bounds trailers and the extensions of chunks tighter;
//   - it knows no empty line before a request;
//   - Host, Transfer-Encoding and Trailer leave its header, and a host in the target
//     comes before that of the field; Cache-Control may be added to Pragma.
func likeNetHTTP(t require.TestingT, text string, got message) {
	text = strings.TrimPrefix(text, "\r\n")
	req, err := http.ReadRequest(bufio.NewReaderSize(strings.NewReader(text), 128<<10))
	if err != nil {
		_, line, _ := strings.Cut(text, " ")
		target, _, _ := strings.Cut(line, " ")
		if _, uerr := url.ParseRequestURI(target); uerr != nil || got.request.Fields.Has("Trailer") {
			return
		}
		require.NoError(t, err)
	}
	require.Equal(t, req.Method, got.request.Method)
	_, line, _ := strings.Cut(text, " ")
	target, _, _ := strings.Cut(line, " ")
	require.Equal(t, req.RequestURI, target)
	if req.URL.Host == "" {
		require.Equal(t, target, got.request.Target)
	}
	require.True(t, wire.Equal(req.Host, got.request.Host), "%q and %q", req.Host, got.request.Host)
	require.Equal(t, req.ContentLength, got.request.Length)

	want, have := header(nil), header(got.request.Fields)
	for name, values := range req.Header {
		want[name] = values
	}
	for _, name := range []string{"Host", "Transfer-Encoding", "Trailer"} {
		want.Del(name)
		have.Del(name)
	}
	if !got.request.Fields.Has("Cache-Control") {
		want.Del("Cache-Control")
	}
	require.Equal(t, want, have)

	if got.err != nil {
		return
	}
	body, err := io.ReadAll(req.Body)
	if err != nil && (strings.Contains(err.Error(), "suspiciously long trailer") || strings.Contains(err.Error(), "too much non-data")) {
		return
	}
	require.NoError(t, err)
	require.Equal(t, string(body), got.body)
	require.Equal(t, keyed(req.Trailer), header(got.trailer))
}

// header gives the values of each name in order.
func header(fields wire.Fields) http.Header {
	h := http.Header{}
	for _, f := range fields {
		key := textproto.CanonicalMIMEHeaderKey(f.Name)
		h[key] = append(h[key], f.Value)
	}
	return h
}

// keyed is h without names that were announced and did not come.
func keyed(h http.Header) http.Header {
	kept := http.Header{}
	for name, values := range h {
		if len(values) > 0 {
			kept[name] = values
		}
	}
	return kept
}

// checkRequest reads text in two ways, and holds what was taken of it against
// net/http.
func checkRequest(t require.TestingT, text string) {
	got := readRequest(whole(text), 4<<10)
	sameMessage(t, got, readRequest(bytewise(text), 7))
	if !got.headed {
		return
	}
	if got.err == nil {
		require.True(t, strings.HasSuffix(text, got.rest))
	}
	likeNetHTTP(t, text, got)
	// What is passed on is read in the same way again.
	line := got.request.Method + " " + got.request.Target + " HTTP/1." + strconv.Itoa(got.request.Minor) + "\r\n"
	head := []byte(line)
	for _, f := range got.request.Fields {
		head = wire.AppendField(head, f.Name, f.Value)
	}
	again := readRequest(whole(string(append(head, "\r\n"...))), 4<<10)
	require.True(t, again.headed, "%v", again.err)
	want := got.request
	if want.Minor == 0 && want.Fields.Get("Host") == "" {
		want.Host = "" // it was in the target
	}
	sameMessage(t, message{request: want}, message{request: again.request})
}

func TestWhatIsTakenNetHTTPUnderstandsToo(t *testing.T) {
	for _, tk := range takens() {
		checkRequest(t, tk.text+"next")
	}
	for _, r := range refusals() {
		checkRequest(t, r.text)
	}
	// Heads that are taken more often than those of chance.
	value := rapid.StringMatching("[ -~\t\u0080-\u00ff]{0,12}")
	name := rapid.OneOf(rapid.SampledFrom([]string{"X-A", "x-a", "Connection", "Accept", "pragma", "Cookie", "TE", "Trailer", "Upgrade", "Date"}),
		rapid.StringMatching("[!#$%&'*+.^_`|~0-9A-Za-z-]{1,8}"))
	framings := []string{"", "", "Content-Length: 0\r\n", "content-length: 5\r\n", "Transfer-encoding: chunked\r\n", "Transfer-Encoding: Chunked\r\nTrailer: X-T\r\n"}
	rapid.Check(t, func(t *rapid.T) {
		var b strings.Builder
		b.WriteString(rapid.SampledFrom([]string{"", "", "\r\n"}).Draw(t, "before"))
		b.WriteString(rapid.StringMatching("[A-Z!~a-z]{1,8}").Draw(t, "method"))
		b.WriteString(" " + rapid.OneOf(rapid.StringMatching("/[!-~]{0,12}"), rapid.Just("http://a/b")).Draw(t, "target"))
		b.WriteString(" HTTP/1." + rapid.StringMatching("[0-9]").Draw(t, "minor") + "\r\nHost: a\r\n")
		for range rapid.IntRange(0, 5).Draw(t, "fields") {
			b.WriteString(name.Draw(t, "name") + ":" + value.Draw(t, "value") + "\r\n")
		}
		b.WriteString(rapid.SampledFrom(framings).Draw(t, "framing") + "\r\n")
		b.WriteString(rapid.SampledFrom([]string{"", "hello", "0\r\n\r\n", "5\r\nhello\r\n0\r\nX-T: v\r\n\r\n"}).Draw(t, "body"))
		checkRequest(t, b.String()+"next")
	})
}

// checkResponse reads text in two ways, and holds it against net/http where both
// take it.
func checkResponse(t require.TestingT, text, method string) {
	got := readResponse(whole(text), method, 4<<10)
	sameMessage(t, got, readResponse(bytewise(text), method, 7))
	if got.err != nil {
		return
	}
	require.True(t, strings.HasSuffix(text, got.rest))
	for _, f := range append(append(wire.Fields{}, got.response.Fields...), got.trailer...) {
		require.True(t, wire.IsToken(f.Name))
		require.True(t, wire.IsValue(f.Value))
		require.Equal(t, strings.Trim(f.Value, " \t"), f.Value)
	}
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(text)), &http.Request{Method: method})
	if err != nil {
		return
	}
	require.Equal(t, resp.StatusCode, got.response.Status)
	body, err := io.ReadAll(resp.Body)
	if err == nil {
		require.Equal(t, string(body), got.body)
	}
}

func FuzzRequest(f *testing.F) {
	for _, tk := range takens() {
		f.Add([]byte(tk.text + "GET /next HTTP/1.1\r\n"))
	}
	for _, r := range refusals() {
		if len(r.text) < 1<<10 {
			f.Add([]byte(r.text))
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) { checkRequest(t, string(text)) })
}

func FuzzResponse(f *testing.F) {
	for _, a := range answers() {
		f.Add([]byte(a.text), a.method == "HEAD")
	}
	for _, c := range badAnswers {
		if len(c.text) < 1<<10 {
			f.Add([]byte(c.text), false)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte, head bool) {
		method := "GET"
		if head {
			method = "HEAD"
		}
		checkResponse(t, string(text), method)
	})
}
