package replayer_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/replayer/exchange"
)

// gorItem writes an item as goreplay's documentation has it.
func gorItem(kind byte, id string, at time.Time, message string) string {
	return fmt.Sprintf("%c %s %d 0\n%s\n🐵🙈🙉\n", kind, id, at.UnixNano(), message)
}

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func zipped(t *testing.T, text string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := io.WriteString(z, text)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.String()
}

// list gives everything in the ledger.
func (b *books) list(t *testing.T) []ledger.Request {
	t.Helper()
	page, err := b.List(t.Context(), ledger.Filter{}, "", 1000)
	require.NoError(t, err)
	require.Empty(t, page.Next)
	return page.Requests
}

// byTarget names messages by what the test knows of them.
func byTarget(t *testing.T, all map[string]message) map[string]message {
	t.Helper()
	by := make(map[string]message)
	for _, m := range all {
		m.id = m.method + " " + m.target
		require.NotContains(t, by, m.id)
		by[m.id] = m.without("X-Request-Received-At")
	}
	return by
}

func TestGoreplayComesInAndGoesOut(t *testing.T) {
	all := corpus()
	began := time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)
	items := make([]string, len(all))
	want := make(map[string]message)
	for i, c := range all {
		head, body := c.stored()
		items[i] = gorItem('1', fmt.Sprintf("%024x", i), began.Add(time.Duration(i)*time.Microsecond), head+string(body)) +
			gorItem('2', fmt.Sprintf("%024x", i), began, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		m := c.message(t, [16]byte{})
		m.id = m.method + " " + m.target
		want[m.id] = m
	}
	rand.Shuffle(len(items), func(i, j int) { items[i], items[j] = items[j], items[i] })
	text := strings.Join(items, "")

	b := newBooks(t)
	p := imported(t, b, 0, "--format", "gor", file(t, "a.gor", text))
	require.Equal(t, fmt.Sprintf("imported %d, known already 0, refused 0, without a redacted value 0\n", len(all)), p.stdout.String())
	// Whatever the file is called, and however it is packed.
	p = imported(t, b, 0, "--format", "gor", file(t, "b.gor.gz", zipped(t, text)))
	require.Equal(t, fmt.Sprintf("imported 0, known already %d, refused 0, without a redacted value 0\n", len(all)), p.stdout.String())

	// They are where their time puts them, and may be sent at once.
	for i, q := range b.list(t) {
		require.Equal(t, began.Add(time.Duration(i)*time.Microsecond), q.ReceivedAt.UTC())
		require.Equal(t, capture.StateReceived, q.State)
		require.True(t, q.Replayable)
		require.Equal(t, capture.DefaultRoute, q.Route)
	}
	requireSame(t, want, byTarget(t, sent(t, b)))
}

func TestGoreplayItemsThatAreNotWhole(t *testing.T) {
	at := time.Now().Add(-time.Hour)
	item := func(message string) string { return gorItem('1', "ab", at, message) }
	const good = "POST /good HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx"
	text := item(good) + // 1
		item("POST /cut HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nabc") + // 2
		item("POST /chunks HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n") + // 3
		item("POST /long HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nabc") + // 4
		item("POST /head HTTP/1.1\r\nHost: h\r\n") + // 5
		item("POST /two HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na") + // 6
		gorItem('1', "ab", time.Unix(0, 0), good) + // 7
		"no item at all\n🐵🙈🙉\n" + // 8
		item("POST /monkeys HTTP/1.1\r\nHost: h\r\nContent-Length: 17\r\n\r\na\n🐵🙈🙉\nb") + // 9, 10
		item(strings.Replace(good, "/good", "/better", 1)) + // 11
		"1 ab 5\nPOST /begun HTTP/1.1\r\n"
	b := newBooks(t)
	p := imported(t, b, 1, "--format", "gor", file(t, "x.gor", text))
	require.Equal(t, "imported 2, known already 0, refused 9, without a redacted value 0\n", p.stdout.String())
	for _, want := range []string{
		"item 2: its body is cut: 3 of 5 bytes are there", "item 3: its body is cut", "item 4: 2 bytes follow its body", "item 5: its head is cut",
		"item 6: there is more than one Content-Length field", "item 7: its time", "item 8: it does not begin with", "item 9: its body is cut",
		"item 10: it does not begin with", "it breaks off in item 12", "some requests were not imported",
	} {
		require.Contains(t, p.stderr.String(), want)
	}
	var targets []string
	for _, q := range b.list(t) {
		targets = append(targets, q.Target)
	}
	require.ElementsMatch(t, []string{"/good", "/better"}, targets)
}

// entries writes an archive as a browser does, with a mark at its begin and things
// around the entries that nobody asked for.
func entries(list ...string) string {
	return "\ufeff" + `{"log":{"version":"1.2","creator":{"name":"WebInspector","version":"537.36"},"pages":[{"id":"page_1","pageTimings":{}}],"entries":[` +
		strings.Join(list, ",") + `],"_after":{"entries":[1,{"log":[]}]}},"_more":[[]]}`
}

func entry(method, url, request string) string {
	return fmt.Sprintf(`{"_initiator":{"type":"other"},"_priority":"High","startedDateTime":"2026-03-01T12:00:00.5+0100","time":1.5,
		"request":{"method":%q,"url":%q,"httpVersion":"h2","queryString":[],"cookies":[],"headersSize":-1,%s},
		"response":{"status":200,"content":{"size":3,"text":"x\ufffdy"}},"cache":{},"timings":{"send":0.1}}`, method, url, request)
}

func TestHAROfOtherTools(t *testing.T) {
	const none = `"headers":[]`
	ahead := time.Now().Add(time.Hour)
	text := entries(
		entry("POST", "https://shop.example/v1/calls?a=%2F&b=c+d#fragment", `"headers":[
			{"name":":authority","value":"other.example"},{"name":":method","value":"POST"},{"name":"content-length","value":"6"},
			{"name":"content-type","value":"application/json"},{"name":"connection","value":"keep-alive, X-Hop"},{"name":"x-hop","value":"1"},
			{"name":"te","value":"trailers"},{"name":"proxy-authorization","value":"Basic eA=="},{"name":"X_Request_UUID","value":"1"},
			{"name":"x-request-replay","value":"1"},{"name":"x-client","value":"c1"},{"name":"x-forwarded-for","value":"192.0.2.1"},
			{"name":"authorization","value":"[redacted]"}],
			"bodySize":6,"postData":{"mimeType":"application/json","text":"{\"ä\"}","params":[]}`), // 1
		entry("GET", "http://api.example", none+`,"bodySize":0`), // 2
		entry("POST", "http://api.example/form", none+`,"postData":{"mimeType":"application/x-www-form-urlencoded; charset=UTF-8","params":[{"name":"a","value":"1 2"},{"name":"b&","value":"ü"}]}`), // 3
		entry("PUT", "http://api.example/b64", none+`,"bodySize":-1,"postData":{"encoding":"base64","text":"AP8="}`),                                                                                 // 4
		entry("POST", "http://api.example/a", none+`,"bodySize":12`),                                                                                                                                 // 5: no body
		entry("POST", "http://api.example/b", none+`,"bodySize":12,"postData":{"text":"short"}`),                                                                                                     // 6
		entry("POST", "http://api.example/c", none+`,"postData":{"text":"a\ufffdb"}`),                                                                                                                // 7
		entry("POST", "http://api.example/d", none+`,"postData":{"mimeType":"multipart/form-data","params":[{"name":"f","fileName":"x.png"}]}`),                                                      // 8
		entry("GET", "wss://api.example/ws", none),                                                                                                                                                   // 9
		entry("GET", "data:text/plain,x", none),                                                                                                                                                      // 10
		entry("GET", "http://api.example/nl", `"headers":[{"name":"a","value":"1\n2"}]`),                                                                                                             // 11
		entry("GET", "http://api.example/name", `"headers":[{"name":"a b","value":"1"}]`),                                                                                                            // 12
		entry("GET", "http://api.example/sp ace", none),                                                                                                                                              // 13
		entry("G T", "http://api.example/", none),                                                                                                                                                    // 14
		entry("GET", "http://bad host/", none),                                                                                                                                                       // 15
		`{"startedDateTime":"yesterday","request":{"method":"GET","url":"http://h/"}}`,                                                                                                               // 16
		`{"startedDateTime":"2026-03-01T12:00:00Z"}`,                                                                                                                                                 // 17
		`{"startedDateTime":"2026-03-01T12:00:00Z","request":{"method":"GET","url":"http://h/","headers":"none"}}`,                                                                                   // 18
		`{"startedDateTime":"1066-03-01T12:00:00Z","request":{"method":"GET","url":"http://h/"}}`,                                                                                                    // 19
		`{"startedDateTime":"2026-03-01T12:00:00Z","request":{"method":"GET","url":"http://h/`+"\xff"+`"}}`,                                                                                          // 20
		entry("PUT", "http://api.example/bad64", none+`,"postData":{"_encoding":"base64","text":"***"}`),                                                                                             // 21
		entry("PUT", "http://api.example/rot", none+`,"postData":{"_encoding":"rot13","text":"nop"}`),                                                                                                // 22
		`{"startedDateTime":"2999-03-01T12:00:00Z","request":{"method":"GET","url":"http://later.example/future"},"_holdfast":{"id":7}}`,                                                             // 23
		`{"startedDateTime":"2999-03-01T12:00:00Z","request":{"method":"GET","url":"http://later.example/future"}}`,                                                                                  // 24
		fmt.Sprintf(`{"startedDateTime":%q,"request":{"method":"GET","url":"http://later.example/future"}}`, ahead.Format(time.RFC3339)),                                                             // 25
		entry("GET", "http://api.example/same", none), entry("GET", "http://api.example/same", none),                                                                                                 // 26, 27
	)
	b := newBooks(t)
	path := file(t, "x.har", text)
	p := imported(t, b, 1, "--format", "har", path)
	for _, want := range []string{
		"item 5: its body of 12 bytes is not in the file", "item 6: its body has 5 bytes, and had 12", "item 7: its body holds the mark of bytes that were lost",
		"item 8: its body is not in the file", "item 9: it is a WebSocket", "item 10: its URL is not an http URL", "item 11: its field a holds a line break",
		`item 12: "a b" is not the name of a field`, "item 13: ", "item 14: ", "item 15: ", "item 16: its startedDateTime is not a time", "item 17: it has no request",
		"item 18: it is no entry", "item 19: its time is before 1970", "item 20: it holds bytes that are not UTF-8", "item 21: its body is not base64",
		"item 22: the encoding of its body is not known", "item 23: it is no entry",
		"item 24: its time is before 1970 or in the future",
	} {
		require.Contains(t, p.stderr.String(), want)
	}
	require.Equal(t, "imported 7, known already 0, refused 20, without a redacted value 1\n", p.stdout.String())
	p = imported(t, b, 1, "--format", "har", path)
	require.Equal(t, "imported 0, known already 7, refused 20, without a redacted value 1\n", p.stdout.String())

	b.later(time.Minute)
	at := "X-Request-Received-At: 2026-03-01T11:00:00.5Z"
	got := make(map[string]message)
	for _, m := range sent(t, b) {
		m.id = ""
		got[m.target] = m
	}
	require.Len(t, got, 6, "two are equal")
	require.Equal(t, message{method: "POST", target: "/v1/calls?a=%2F&b=c+d", framing: "length", body: []byte(`{"ä"}`), fields: []string{
		"Host: shop.example", at, "content-type: application/json", "x-client: c1", "x-forwarded-for: 192.0.2.1",
	}}, got["/v1/calls?a=%2F&b=c+d"])
	require.Equal(t, message{method: "GET", target: "/", body: []byte{}, fields: []string{"Host: api.example", at}}, got["/"])
	require.Equal(t, "a=1+2&b%26=%C3%BC", string(got["/form"].body))
	require.Equal(t, []byte{0, 0xff}, got["/b64"].body)
	received, err := time.Parse("X-Request-Received-At: "+time.RFC3339Nano, got["/future"].fields[1])
	require.NoError(t, err)
	require.True(t, received.Before(ahead), "nothing was received in the future")
}

func TestFilesThatBreakOff(t *testing.T) {
	whole := entries(entry("GET", "http://h/1", `"headers":[]`), entry("GET", "http://h/2", `"headers":[]`))
	for name, c := range map[string]struct {
		text, want string
		imported   int
	}{
		"empty":        {"", "it is no HAR file", 0},
		"not JSON":     {"hello", "it is no HAR file", 0},
		"no entries":   {`{"log":{"version":"1.2"}}`, "it has no entries", 0},
		"in an entry":  {whole[:strings.Index(whole, "http://h/2")], "it breaks off in item 2", 1},
		"behind them":  {whole[:len(whole)-1], "it breaks off after item 2", 2},
		"torn gzip":    {zipped(t, whole)[:60], "it is no HAR file", 0},
		"no such file": {"", "no such file", 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			path := file(t, "x", c.text)
			if name == "no such file" {
				require.NoError(t, os.Remove(path))
			}
			// The others are imported all the same.
			p := imported(t, b, 1, "--format", "har", path, file(t, "y", entries(entry("GET", "http://h/3", `"headers":[]`))))
			require.Contains(t, p.stderr.String(), c.want)
			require.Contains(t, p.stdout.String(), fmt.Sprintf("imported %d, known already 0, refused 0,", c.imported+1))
			require.Len(t, b.list(t), c.imported+1)
		})
	}
}

func TestImportedRequestsHaveThePolicyOfTheirRoute(t *testing.T) {
	b := newBooks(t)
	routes := file(t, "routes.yaml", `routes:
- name: calls
  match: {hosts: [shop.example], path: {prefix: /v1/calls}}
  upstream: {url: "http://api:1", timeout: 5s}
  order_by: "header:X-Client"
  completion: {by: event}
  capture: {max_body: 8B}
- name: rest
  match: {hosts: [api.example]}
  upstream: {url: "http://api:2", timeout: 7s}
`)
	archive := file(t, "x.har", entries(
		entry("POST", "http://shop.example/v1/calls/1", `"headers":[{"name":"x-client","value":"a"},{"name":"X-Client","value":"b"}]`),
		entry("POST", "http://api.example/", `"headers":[]`),
		entry("POST", "http://nobody.example/", `"headers":[]`),
		entry("POST", "http://shop.example/v1/calls/2", `"headers":[],"postData":{"text":"nine byte"}`),
	))
	run := func(code int, args ...string) *process {
		p := command(t, b, nowhere, "", append([]string{"import", "--format", "har", archive}, args...)...)
		p.Env = append(p.Env, "HOLDFAST_ROUTES_FILE="+routes)
		require.Equal(t, code, p.code(t), p.stderr.String())
		return p
	}
	p := run(1)
	require.Contains(t, p.stderr.String(), "item 3: no route takes it")
	require.Contains(t, p.stderr.String(), "item 4: its body has 9 bytes, and route calls takes 8")
	list := b.list(t)
	require.Len(t, list, 2)
	for _, q := range list {
		require.Equal(t, "import", q.Ingress)
		switch q.Route {
		case "calls":
			// A completion event needs its grace after a replay's answer too.
			require.Equal(t, "a,b", q.OrderKey)
			require.Equal(t, time.Minute, q.Policy.Grace)
			require.Equal(t, 5*time.Second, q.Policy.Timeout)
			require.Equal(t, capture.ByEvent, q.Policy.By)
			require.False(t, q.Replayable)
		case "rest":
			require.Zero(t, q.Policy.Grace)
			require.Equal(t, 7*time.Second, q.Policy.Timeout)
			require.True(t, q.Replayable)
		default:
			require.Fail(t, q.Route)
		}
	}
	// The same requests are no others because they are given to a route.
	p = run(0, "--route", "rest")
	require.Contains(t, p.stdout.String(), "imported 2, known already 2, refused 0,")
}

func TestALargeBodyComesInParts(t *testing.T) {
	body := noise(3<<20 + 1)
	archive := file(t, "x.har", entries(entry("PUT", "http://h/large", `"headers":[],"bodySize":`+fmt.Sprint(len(body))+`,"postData":{"_encoding":"base64","text":"`+base64.StdEncoding.EncodeToString(body)+`"}`)))
	b := newBooks(t)
	imported(t, b, 0, "--format", "har", archive)
	p := imported(t, b, 0, "--format", "har", archive)
	require.Contains(t, p.stdout.String(), "imported 0, known already 1, refused 0,")
	for _, m := range sent(t, b) {
		require.True(t, bytes.Equal(body, m.body))
	}
	stats, err := b.Stats(t.Context())
	require.NoError(t, err)
	require.Empty(t, stats.Aside)
}

// full is a ledger without room for the second batch.
type full struct {
	*books
	calls int
}

func (f *full) Record(ctx context.Context, items []ledger.Item) ([]ledger.Result, error) {
	if f.calls++; f.calls == 2 {
		return nil, ledger.ErrFull
	}
	return f.books.Record(ctx, items)
}

func TestALedgerThatFillsUpIsSaid(t *testing.T) {
	var list []string
	for i := range 1200 {
		list = append(list, entry("GET", fmt.Sprintf("http://h/%d", i), `"headers":[]`))
	}
	table, err := route.Load(service.Routes{
		UpstreamURL: service.URL{URL: *mustURL(t, "http://h")}, UpstreamTimeout: time.Second, Completion: "response", Capture: "required", OnFailure: "passthrough",
	}, 1<<20)
	require.NoError(t, err)
	b := newBooks(t)
	into := func(l exchange.Recorder) (exchange.Imported, error) {
		return exchange.Import(t.Context(), exchange.ImportOptions{
			Ledger: l, Reader: exchange.NewHARReader(strings.NewReader(entries(list...))), Route: table.Match, Now: time.Now(),
			Refused: func(number int, reason string) { require.Fail(t, reason, "item %d", number) },
		})
	}
	done, err := into(&full{books: b})
	require.ErrorIs(t, err, ledger.ErrFull)
	require.Equal(t, exchange.Imported{New: 500}, done)
	done, err = into(b)
	require.NoError(t, err)
	require.Equal(t, exchange.Imported{New: 700, Known: 500}, done)
}

func TestManyPages(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(1234)...)
	var got []string
	p := exported(t, b, "http://h", 0, "--format", "vegeta", "--limit", "1100")
	for line := range strings.Lines(p.stdout.String()) {
		var target struct{ Header map[string][]string }
		require.NoError(t, json.Unmarshal([]byte(line), &target))
		got = append(got, target.Header["X-Request-UUID"]...)
	}
	require.Len(t, got, 1100)
	for i, id := range got {
		require.Equal(t, ids[i].String(), id)
	}
}

func mustURL(t *testing.T, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	require.NoError(t, err)
	return u
}
