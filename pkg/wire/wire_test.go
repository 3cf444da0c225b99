package wire_test

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// The limits of most tests.
const (
	headLimit  = 64 << 10
	fieldLimit = 128
)

// pieces gives its text in pieces of these sizes, and the rest in one. What
// comes after the text is end. Like a TLS connection it gives the end with the
// last bytes where together is set.
type pieces struct {
	text     string
	sizes    []int
	end      error
	together bool
}

func (p *pieces) Read(b []byte) (int, error) {
	if p.text == "" {
		return 0, p.end
	}
	n := len(p.text)
	if len(p.sizes) > 0 {
		n, p.sizes = p.sizes[0], p.sizes[1:]
	}
	n = copy(b, p.text[:min(n, len(p.text))])
	p.text = p.text[n:]
	if p.text == "" && p.together {
		return n, p.end
	}
	return n, nil
}

func whole(text string) io.Reader { return &pieces{text: text, end: io.EOF} }

// bytewise gives one byte at a time.
func bytewise(text string) io.Reader {
	sizes := make([]int, len(text))
	for i := range sizes {
		sizes[i] = 1
	}
	return &pieces{text: text, sizes: sizes, end: io.EOF}
}

// split gives the text in pieces that rapid chooses.
func split(t *rapid.T, text string) io.Reader {
	return &pieces{
		text: text, end: io.EOF, together: rapid.Bool().Draw(t, "end with the last bytes"),
		sizes: rapid.SliceOfN(rapid.IntRange(1, 40), 0, len(text)).Draw(t, "sizes"),
	}
}

// message is all that was read of a connection that carries one message.
type message struct {
	request  wire.Request
	response wire.Response
	body     string
	trailer  wire.Fields
	rest     string // what follows it
	headed   bool   // the head was taken
	status   int    // of a SyntaxError
	err      error  // of head or body, nil when all came
}

func (m *message) fail(err error) message {
	m.err = err
	var syntax *wire.SyntaxError
	if errors.As(err, &syntax) {
		m.status = syntax.Status
	}
	return *m
}

// drain reads the body in reads of at most size bytes, and what follows.
func (m *message) drain(r *wire.Reader, length int64, size int, lenient bool) message {
	m.headed = true
	var b wire.Body
	b.Reset(r, length, headLimit, fieldLimit, lenient)
	var body strings.Builder
	buf := make([]byte, size)
	var err error
	for err == nil {
		var n int
		n, err = b.Read(buf)
		body.Write(buf[:n])
	}
	m.body, m.trailer = body.String(), b.Trailer
	if again, repeated := b.Read(buf); again != 0 || repeated != err {
		panic("the end of a body is not its end")
	}
	if b.Done() != (err == io.EOF) || b.Err() != err {
		panic("Done and Err say something else than Read")
	}
	if err != io.EOF {
		return m.fail(err)
	}
	rest, _ := io.ReadAll(readerOf(r))
	m.rest = string(rest)
	return *m
}

// readerOf is r without the methods that io looks for.
func readerOf(r *wire.Reader) io.Reader { return struct{ io.Reader }{r} }

// readRequest reads a request, its body and what follows.
func readRequest(src io.Reader, size int) message {
	var m message
	r := wire.NewReader(src)
	if err := wire.ReadRequest(r, &m.request, headLimit, fieldLimit); err != nil {
		return m.fail(err)
	}
	return m.drain(r, m.request.Length, size, false)
}

// readResponse does so with the answer to a request of this method.
func readResponse(src io.Reader, method string, size int) message {
	var m message
	r := wire.NewReader(src)
	if err := wire.ReadResponse(r, &m.response, method, headLimit, fieldLimit); err != nil {
		return m.fail(err)
	}
	return m.drain(r, m.response.Length, size, true)
}

// sameMessage demands that two readings of one text agree.
func sameMessage(t require.TestingT, want, got message) {
	if want.err == nil {
		require.NoError(t, got.err)
	} else {
		require.EqualError(t, got.err, want.err.Error())
	}
	// Slices that are nil or empty mean the same.
	for _, m := range []*message{&want, &got} {
		m.err = nil
		m.request.Fields = append(wire.Fields{}, m.request.Fields...)
		m.request.Nominated = append([]string{}, m.request.Nominated...)
		m.response.Fields = append(wire.Fields{}, m.response.Fields...)
		m.response.Nominated = append([]string{}, m.response.Nominated...)
	}
	require.Equal(t, want, got)
}

// lines joins lines with CRLF, and ends the head.
func lines(l ...string) string { return strings.Join(l, "\r\n") + "\r\n\r\n" }

// get is a request with these further field lines.
func get(fields ...string) string {
	return lines(append([]string{"GET / HTTP/1.1", "Host: a"}, fields...)...)
}

// post is a request with a chunked body.
func post(body string) string {
	return lines("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked") + body
}

func TestReaderGivesItsBufferAwayOnlyWhenItIsEmpty(t *testing.T) {
	r := wire.NewReader(whole("ab"))
	require.Nil(t, r.Take())
	one := make([]byte, 1)
	_, err := io.ReadFull(r, one)
	require.NoError(t, err)
	require.Equal(t, "b", string(r.Buffered()))
	require.Nil(t, r.Take(), "something is in it")
	_, err = io.ReadFull(r, one)
	require.NoError(t, err)
	require.Len(t, r.Take(), wire.BufferBytes)
	require.Nil(t, r.Take(), "it was given away")
	_, err = r.Read(one)
	require.Equal(t, io.EOF, err)
}

func TestReaderFillsFromABufferThatWasReadElsewhere(t *testing.T) {
	buf := make([]byte, wire.BufferBytes)
	n := copy(buf, "GET / HTTP/1.1\r\nHost: a\r\n")
	r := wire.NewReader(whole("\r\nnext"))
	r.Fill(buf, n)
	require.False(t, r.HasHead())
	var req wire.Request
	require.NoError(t, wire.ReadRequest(r, &req, headLimit, fieldLimit))
	require.Equal(t, "a", req.Host)
	require.Equal(t, "next", string(r.Buffered()))
}

// A source that gives neither bytes nor an error must not be asked for ever.
func TestReaderRefusesASourceThatGivesNothing(t *testing.T) {
	var req wire.Request
	require.Equal(t, io.ErrNoProgress, wire.ReadRequest(wire.NewReader(&pieces{}), &req, headLimit, fieldLimit))
	m := readRequest(&pieces{text: post("")}, 16<<10)
	require.Equal(t, io.ErrNoProgress, m.err)
	m = readRequest(&pieces{text: post("2000\r\n")}, 16<<10)
	require.Equal(t, io.ErrNoProgress, m.err)
}

func TestKindsOfFieldsInEveryLetterCase(t *testing.T) {
	hop := map[string]bool{
		"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "TE": true, "Trailer": true, "Transfer-Encoding": true,
		"Upgrade": true, "Proxy-Authenticate": true, "Proxy-Authorization": true, "Proxy-Authentication-Info": true,
		"Host": false, "Content-Length": false, "Via": false, "X-Other": false, "Expect": false, "Date": false,
		"X-A-Name-That-Is-Longer-Than-All-That-Are-Known": false,
	}
	for name, want := range hop {
		for _, spelled := range []string{name, strings.ToLower(name), strings.ToUpper(name)} {
			require.Equal(t, want, wire.KindOf(spelled).HopByHop(), spelled)
		}
	}
	require.Equal(t, wire.ContentLength, (&wire.Field{Name: "content_LENGTH"}).Meaning())
	require.Equal(t, wire.Other, wire.KindOf("content_length"))
	require.Equal(t, wire.Other, wire.KindOf("Keep-Al\u0131ve"))
}

func TestFieldsFindNamesInEveryLetterCase(t *testing.T) {
	fs := wire.Fields{}.Add("A", "1").Add("b", "2").Add("a", "3")
	require.Equal(t, "1", fs.Get("a"))
	require.Equal(t, []string{"1", "3"}, fs.Values("A"))
	require.Nil(t, fs.Values("c"))
	require.True(t, fs.Has("B"))
	require.False(t, fs.Has("c"))
	require.Empty(t, fs.Get("c"))
}

func TestTokensCompareByASCIIAlone(t *testing.T) {
	require.True(t, wire.HasToken(" a ,\tCHUNKED,", "chunked"))
	require.False(t, wire.HasToken("chunkedd, chun ked", "chunked"))
	require.False(t, wire.HasToken("chun\u212Aed", "chunked"), "a Kelvin sign folds into a k")
}

func TestHosts(t *testing.T) {
	for host, want := range map[string]bool{
		"a": true, "a.example:80": true, "a:": true, "127.0.0.1:1": true, "[::1]": true, "[::1]:65535": true, "[fe80::1%25eth0]": true,
		"a%20b": true, "_dmarc.example": true, "a;b": true,
		"": false, ":80": false, "a:b": false, "a,b": false, "a:123456": false, "a:80:80": false, "[::1": false, "[a]": false, "[::1]x": false, "[[::1]": false,
		"[::1[]": false, "a]": false, "a%2": false, "a%zz": false, "a@b": false, "a/b": false, "a b": false, "a\\b": false, "a\"": false,
		"ä": false, "a\x00": false, strings.Repeat("a", 263): false,
	} {
		require.Equal(t, want, wire.ValidHost(host), "%q", host)
	}
}

func TestTargetsThatCameByAnotherWay(t *testing.T) {
	require.NoError(t, wire.CheckTarget("GET", "/a%2F//?|\xff"))
	require.NoError(t, wire.CheckTarget("OPTIONS", "*"))
	for _, target := range []string{"", "*", "a", "http://a/", "/ HTTP/1.1", "/a\r\nb", "/#a", "/\x00"} {
		require.Error(t, wire.CheckTarget("GET", target), target)
	}
}

func TestChunksAreWrittenAsTheyAreRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOf(rapid.StringMatching(`(?s).{1,50}`)).Draw(t, "chunks")
		trailer := wire.Fields{}.Add("X-T", "v").Add("x-u", "")
		var text []byte
		for _, part := range parts {
			text = wire.AppendChunk(text, []byte(part))
		}
		text = wire.AppendLastChunk(text, trailer)
		m := readRequest(split(t, post(string(text)+"next")), rapid.IntRange(1, 9000).Draw(t, "read"))
		require.NoError(t, m.err)
		require.Equal(t, strings.Join(parts, ""), m.body)
		require.Equal(t, trailer, m.trailer)
		require.Equal(t, "next", m.rest)
	})
}
