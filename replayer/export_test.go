package replayer_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/har"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	vegeta "github.com/tsenart/vegeta/v12/lib"
	_ "modernc.org/sqlite"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// message is a request as it stands on the wire, taken apart without any code of
// ours.
type message struct {
	method, target string
	fields         []string // "name: value", sorted; without framing and UUID
	framing        string   // "", "length" or "chunked"
	trailer        []string
	body           []byte
	id             string
}

func parseMessage(t require.TestingT, r *bufio.Reader) (m message, ok bool) {
	line := func() (string, bool) {
		s, err := r.ReadString('\n')
		return strings.TrimSuffix(s, "\r\n"), err == nil
	}
	first, ok := line()
	if !ok {
		return m, false
	}
	parts := strings.SplitN(first, " ", 3)
	require.Len(t, parts, 3, "%q", first)
	m.method, m.target = parts[0], parts[1]
	length := int64(0)
	for {
		s, ok := line()
		require.True(t, ok, "the head is cut")
		if s == "" {
			break
		}
		name, value, ok := strings.Cut(s, ":")
		require.True(t, ok, "%q", s)
		value = strings.TrimSpace(value)
		switch strings.ToLower(name) {
		case "content-length":
			n, err := strconv.ParseInt(value, 10, 64)
			require.NoError(t, err)
			length, m.framing = n, "length"
		case "transfer-encoding":
			require.Equal(t, "chunked", value)
			m.framing = "chunked"
		case "x-request-uuid":
			m.id = value
		default:
			m.fields = append(m.fields, name+": "+value)
		}
	}
	slices.Sort(m.fields)
	var body io.Reader = io.LimitReader(r, length)
	if m.framing == "chunked" {
		body = httputil.NewChunkedReader(r)
	}
	var err error
	m.body, err = io.ReadAll(body)
	require.NoError(t, err)
	if m.framing != "chunked" {
		require.Len(t, m.body, int(length))
		return m, true
	}
	for {
		s, ok := line()
		require.True(t, ok, "the trailer section is cut")
		if s == "" {
			return m, true
		}
		m.trailer = append(m.trailer, s)
	}
}

// without drops fields by name.
func (m message) without(names ...string) message {
	m.fields = slices.DeleteFunc(slices.Clone(m.fields), func(s string) bool {
		name, _, _ := strings.Cut(s, ":")
		return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) })
	})
	return m
}

// wireAPI is an API that keeps what arrives, byte for byte.
type wireAPI struct {
	net.Listener
	mu   sync.Mutex
	seen []message
	done sync.WaitGroup
}

// failures tells of what a connection met after the test cannot stop any more.
type failures struct{ t *testing.T }

func (f failures) Errorf(format string, args ...any) { f.t.Errorf(format, args...) }
func (f failures) FailNow()                          { panic(http.ErrAbortHandler) }

func newWireAPI(t *testing.T) *wireAPI {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	a := &wireAPI{Listener: l}
	a.done.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.done.Go(func() { a.serve(failures{t}, c) })
		}
	})
	t.Cleanup(func() { require.NoError(t, l.Close()); a.done.Wait() })
	return a
}

func (a *wireAPI) serve(t require.TestingT, c net.Conn) {
	defer func() { _ = c.Close() }()
	defer func() { _ = recover() }() // the test has failed already
	if err := c.SetDeadline(time.Now().Add(bound)); err != nil {
		return
	}
	m, ok := parseMessage(t, bufio.NewReader(c))
	if !ok {
		return // a probe
	}
	a.mu.Lock()
	a.seen = append(a.seen, m)
	a.mu.Unlock()
	_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

func (a *wireAPI) url() string { return "http://" + a.Addr().String() }

// messages gives what arrived by id.
func (a *wireAPI) messages(t *testing.T) map[string]message {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	by := make(map[string]message)
	for _, m := range a.seen {
		require.NotContains(t, by, m.id, "arrived twice")
		by[m.id] = m
	}
	return by
}

// all256 holds every byte.
func all256() []byte {
	b := make([]byte, 256)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{7})
	_, _ = r.Read(b) // never fails
	return b
}

// captured is a request of the corpus as it was captured: head without framing.
type captured struct {
	head    string
	body    []byte
	framed  bool
	chunked bool   // stored in parts
	trailer string // lines; the body is stored in the chunked coding
	// What a tool cannot send.
	notCurl, notVegeta bool
}

func post(target, fields string, body string) captured {
	return captured{head: "POST " + target + " HTTP/1.1\r\nHost: api.example\r\n" + fields, body: []byte(body), framed: true}
}

// corpus holds what is hard on shells, quoting, URLs and JSON.
func corpus() []captured {
	const plain = "User-Agent: x/1\r\nAccept: */*\r\nAccept-Encoding: br\r\n"
	json := plain + "Content-Type: application/json\r\n"
	obs := post("/obs", json+"X-Latin: caf\xe9 \xff\x80\x81\r\n", "1")
	obs.notVegeta = true
	rawTarget := post("/caf\xe9/\xff?\x80=\xc3\xa4", json, "1")
	rawTarget.notVegeta = true
	quotes := post(`/a//b/./../c;d?x[1]={y}&$(id)&'q'"\`+"`id`|^~!*%2F%2e", json, "1")
	badEscape := post("/100%/%zz?%", json, "1")
	badEscape.notVegeta = true
	star := captured{head: "OPTIONS * HTTP/1.1\r\nHost: api.example\r\n" + plain, notVegeta: true}
	head := captured{head: "HEAD /h?x=1 HTTP/1.1\r\nHost: api.example\r\n" + plain}
	headBody := captured{head: "HEAD /hb HTTP/1.1\r\nHost: api.example\r\n" + plain, body: []byte("x"), framed: true, notCurl: true}
	trailers := captured{
		head: "POST /t HTTP/1.1\r\nHost: api.example\r\n" + json, body: []byte("with trailers"), trailer: "X-Sum: 7\r\nX-Empty: \r\n",
		notCurl: true, notVegeta: true,
	}
	large := post("/large", json, string(noise(1536<<10+7)))
	large.chunked = true
	several := post("/agents", "User-Agent: a\r\nuser-agent: b\r\nAccept: a\r\nAccept: b\r\nAccept-Encoding: br\r\nContent-Type: a\r\nContent-Type: b\r\n", "1")
	several.notVegeta = true
	return []captured{
		post("/text", json, `{"it's": "a \\ \"quoted\" $HOME `+"`id`"+` %s %% text"}`+"\nsecond\tline\n"),
		post("/at", json, "@/etc/passwd"),
		post("/dash", json, "-n --version"),
		post("/crlf", json, "a\r\nb\r\n\r\n"),
		post("/utf8", json, `{"name":"Grüße, мир, 日本 🐵 \u2028`+"\u2028\ufffd\"}"),
		post("/256", json, string(all256())),
		post("/nul", json, "\x00"),
		post("/newlines", json, "\n\n\n"),
		post("/no-type", plain, "no type at all"),
		post("/form", plain+"Content-Type: application/x-www-form-urlencoded\r\n", "a=1&b=%20+&a=2"),
		post("/empty", json, ""),
		post("/eight", json, strings.Repeat("x", 8<<10)), post("/nine", json, strings.Repeat("y", 8<<10+1)),
		post("/silent", "Accept-Encoding: br\r\n", "neither User-Agent nor Accept"),
		post("/fields", json+"X-Empty: \r\nx-lower: a\r\nX_Under: b\r\nX-Same: 1\r\nx-same: 2\r\nX-Same: 1\r\nX-At: @file\r\nX-Quote: it's \"$HOME\" \\ `id` ; # \t!\r\nX-Colon: a: b\r\nX-Semi: a;\r\nExpectation: none\r\n"+
			"X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\nVia: 1.1 holdfast\r\nTraceparent: 00-1-2-3\r\nIdempotency-Key: k\r\n", "1"),
		post("/big?q=1#"[:8], json, "x"),
		post("/a//b/./../c?x=%2F&&y=a+b&%20=", json, "1"),
		post("/?", json, "1"), post("//double", json, "1"),
		{head: "POST /unframed HTTP/1.1\r\nHost: api.example\r\n" + plain},
		{head: "DELETE /d HTTP/1.1\r\nHost: api.example:8080\r\n" + plain},
		{head: "GET /g HTTP/1.1\r\nHost: api.example\r\n" + plain + "Content-Type: a/b\r\n", body: []byte("a GET with a body"), framed: true},
		{head: "PURGE /p HTTP/1.1\r\nHost: api.example\r\n" + plain},
		{head: "m-search!#$%&'*+^_`|~ /m HTTP/1.1\r\nHost: api.example\r\n" + plain},
		obs, rawTarget, quotes, badEscape, star, head, headBody, trailers, large, several,
	}
}

// stored gives head and body as they are captured.
func (c captured) stored() (head string, body []byte) {
	switch {
	case c.trailer != "":
		body = fmt.Appendf(nil, "%x\r\n%s\r\n0\r\n%s\r\n", len(c.body), c.body, c.trailer)
		return c.head + "Transfer-Encoding: chunked\r\n\r\n", body
	case c.framed:
		return fmt.Sprintf("%sContent-Length: %d\r\n\r\n", c.head, len(c.body)), c.body
	}
	return c.head + "\r\n", nil
}

// message gives it as an API should see it.
func (c captured) message(t *testing.T, id uuid.UUID) message {
	t.Helper()
	head, body := c.stored()
	m, ok := parseMessage(t, bufio.NewReader(io.MultiReader(strings.NewReader(head), bytes.NewReader(body))))
	require.True(t, ok)
	m.id = id.String()
	return m
}

// keep records requests that failed at their first try, in the order of their ids.
func (b *books) keep(t *testing.T, all []captured) []uuid.UUID {
	t.Helper()
	now, err := b.Now(t.Context())
	require.NoError(t, err)
	ids := make([]uuid.UUID, len(all))
	var items []ledger.Item
	var facts []ledger.Fact
	for i, c := range all {
		ids[i], err = uuid.NewV7()
		require.NoError(t, err)
		head, body := c.stored()
		r := &capture.Request{
			ID: ids[i], Route: capture.DefaultRoute, Ingress: "gw", ReceivedAt: now.Add(time.Duration(i) * time.Nanosecond),
			Policy: newPolicy(), Head: []byte(head), Body: body, Size: int64(len(body)),
		}
		if c.chunked {
			sum := sha256.Sum256(body)
			r.SHA256, r.Body = hex.EncodeToString(sum[:]), nil
			for part := range slices.Chunk(body, 256<<10) {
				items = append(items, ledger.Item{Captured: capture.Captured{Chunk: &capture.Chunk{
					ID: r.ID, Route: r.Route, Ingress: "gw", Number: r.Chunks, Data: part,
				}}})
				r.Chunks++
			}
		}
		items = append(items, ledger.Item{Captured: capture.Captured{Request: r}})
		facts = append(facts, ledger.Fact{Outcome: &capture.Outcome{ID: r.ID, Ingress: "gw", Attempt: capture.Attempt{
			Number: capture.FirstAttempt, StartedAt: now, EndedAt: now.Add(1500 * time.Microsecond), Status: 503, Verdict: capture.Failed,
		}}})
	}
	results, err := b.Record(t.Context(), items)
	require.NoError(t, err)
	for _, r := range results {
		require.NoError(t, r.Err)
	}
	errs, err := b.Complete(t.Context(), facts)
	require.NoError(t, err)
	require.Equal(t, make([]error, len(facts)), errs)
	return ids
}

// exported runs export and gives its stdout.
func exported(t *testing.T, b *books, apiURL string, code int, args ...string) *process {
	t.Helper()
	p := command(t, b, nowhere, apiURL, append([]string{"export", "--secrets"}, args...)...)
	require.Equal(t, code, p.code(t), p.stderr.String())
	return p
}

func TestCurlSendsWhatWasCaptured(t *testing.T) {
	b := newBooks(t)
	all := corpus()
	ids := b.keep(t, all)
	for _, shell := range []string{"dash", "bash"} {
		path, err := exec.LookPath(shell)
		require.NoError(t, err)
		for _, to := range []string{"file", "stdout"} {
			t.Run(shell+", "+to, func(t *testing.T) {
				api := newWireAPI(t)
				dir := filepath.Join(t.TempDir(), "it's $HOME")
				require.NoError(t, os.Mkdir(dir, 0o700))
				script := filepath.Join(dir, "-out 'x'.sh")
				args := []string{"--format", "curl", "--out", script}
				if to == "stdout" {
					args = args[:2]
				}
				p := exported(t, b, api.url(), 3, args...)
				if to == "stdout" {
					require.NoError(t, os.WriteFile(script, p.stdout.Bytes(), 0o600))
				}
				require.Contains(t, p.stderr.String(), fmt.Sprintf("exported %d requests: whole %d, marked 1, left out 1\n", len(all), len(all)-2))
				cmd := exec.Command(path, script)
				cmd.Dir = "/"
				out, err := cmd.CombinedOutput()
				require.NoError(t, err, string(out))
				got := api.messages(t)
				want := make(map[string]message)
				lines := ""
				for i, c := range all {
					m := c.message(t, ids[i])
					switch {
					case c.trailer != "":
						m.trailer = nil
					case c.notCurl:
						continue
					}
					want[m.id] = m
					lines += "200 " + m.id + "\n"
				}
				requireSame(t, want, got)
				require.Equal(t, lines, string(out), "in the order of ids")
			})
		}
	}
}

// requireSame compares without printing large bodies.
func requireSame(t *testing.T, want, got map[string]message) {
	t.Helper()
	for id, w := range want {
		g, ok := got[id]
		require.True(t, ok, "%s %s did not arrive", w.method, w.target)
		require.True(t, bytes.Equal(w.body, g.body), "body of %s %s: %d bytes, want %d", w.method, w.target, len(g.body), len(w.body))
		w.body, g.body = nil, nil
		require.Equal(t, w, g)
	}
	require.Len(t, got, len(want))
}

func TestVegetaSendsWhatWasCaptured(t *testing.T) {
	b := newBooks(t)
	all := corpus()
	ids := b.keep(t, all)
	api := newWireAPI(t)
	left := 0
	want := make(map[string]message)
	for i, c := range all {
		if c.notVegeta && c.trailer == "" {
			left++
			continue
		}
		m := c.message(t, ids[i])
		// Go decides by the method whether it tells of no body.
		m.trailer, m.framing = nil, ""
		want[m.id] = m
	}
	p := exported(t, b, api.url(), 3, "--format", "vegeta")
	require.Contains(t, p.stderr.String(), fmt.Sprintf("whole %d, marked 1, left out %d\n", len(all)-left-1, left))
	attacker := vegeta.NewAttacker(vegeta.Workers(1), vegeta.MaxWorkers(1), vegeta.KeepAlive(false))
	for r := range attacker.Attack(vegeta.NewJSONTargeter(&p.stdout, nil, nil), vegeta.Rate{Freq: 1000, Per: time.Second}, 0, "") {
		if r.Error != vegeta.ErrNoTargets.Error() {
			require.Empty(t, r.Error)
		}
	}
	got := api.messages(t)
	for id, m := range got {
		m.framing = ""
		got[id] = m.without("Connection", "X-Vegeta-Seq") // of KeepAlive above, and of vegeta itself
	}
	requireSame(t, want, got)
}

func TestRawMessagesAreWhatWasCaptured(t *testing.T) {
	b := newBooks(t)
	all := corpus()
	ids := b.keep(t, all)
	dir := filepath.Join(t.TempDir(), "raw")
	exported(t, b, "", 0, "--format", "raw", "--out", dir)
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, len(all))
	want, got := make(map[string]message), make(map[string]message)
	for i, c := range all {
		data, err := os.ReadFile(filepath.Join(dir, ids[i].String()+".http"))
		require.NoError(t, err)
		r := bufio.NewReader(bytes.NewReader(data))
		m, ok := parseMessage(t, r)
		require.True(t, ok)
		_, err = r.ReadByte()
		require.ErrorIs(t, err, io.EOF, "nothing follows")
		got[m.id] = m
		m = c.message(t, ids[i])
		want[m.id] = m
	}
	requireSame(t, want, got)
	p := exported(t, b, "", 1, "--format", "raw", "--out", dir)
	require.Contains(t, p.stderr.String(), "file exists")
	again, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, again, len(all), "what was there stays")
}

// TestHARIsReadByOthers reads it with the types that Chrome's protocol defines.
func TestHARIsReadByOthers(t *testing.T) {
	b := newBooks(t)
	all := corpus()
	ids := b.keep(t, all)
	p := exported(t, b, "http://api.example:3000", 0, "--format", "har")
	var archive har.HAR
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &archive))
	require.Equal(t, "1.2", archive.Log.Version)
	require.NotEmpty(t, archive.Log.Creator.Name)
	require.NotEmpty(t, archive.Log.Creator.Version)
	require.Len(t, archive.Log.Entries, len(all))
	for i, e := range archive.Log.Entries {
		m := all[i].message(t, ids[i])
		_, err := time.Parse(time.RFC3339, e.StartedDateTime)
		require.NoError(t, err)
		require.Equal(t, m.method, e.Request.Method)
		require.Equal(t, 1.5, e.Time)
		require.NotNil(t, e.Cache)
		require.Equal(t, e.Time, e.Timings.Send+e.Timings.Wait+e.Timings.Receive)
		require.EqualValues(t, 503, e.Response.Status)
		require.Equal(t, "Service Unavailable", e.Response.StatusText)
		parsed, err := http.NewRequest("GET", e.Request.URL, nil)
		require.NoError(t, err, e.Request.URL)
		require.Equal(t, "api.example:3000", parsed.URL.Host)
		require.Len(t, e.Request.Headers, len(m.fields)+1+min(len(m.framing), 1))
		if len(m.body) == 0 {
			require.Nil(t, e.Request.PostData)
		} else {
			require.NotEmpty(t, e.Request.PostData.Text)
		}
		require.EqualValues(t, len(m.body), e.Request.BodySize)
	}
	// HAR 1.2 names what may be left out; everything else must be there.
	var loose struct {
		Log struct{ Entries []map[string]any }
	}
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &loose))
	for _, e := range loose.Log.Entries {
		requireKeys(t, e, "startedDateTime time request response cache timings")
		requireKeys(t, e["request"], "method url httpVersion cookies headers queryString headersSize bodySize")
		requireKeys(t, e["response"], "status statusText httpVersion cookies headers content redirectURL headersSize bodySize")
		requireKeys(t, e["response"].(map[string]any)["content"], "size mimeType")
		requireKeys(t, e["timings"], "send wait receive")
		for _, list := range []string{"cookies", "headers", "queryString"} {
			require.IsType(t, []any{}, e["request"].(map[string]any)[list])
		}
	}
}

func requireKeys(t *testing.T, object any, names string) {
	t.Helper()
	for name := range strings.FieldsSeq(names) {
		require.Contains(t, object, name)
	}
}

// sent runs what is in the ledger against an API and gives what arrived.
func sent(t *testing.T, b *books) map[string]message {
	t.Helper()
	api := newWireAPI(t)
	report := mustRun(t, options(t, b, api.url()))
	require.Zero(t, report.ExitCode, "%+v", report)
	got := api.messages(t)
	for id, m := range got {
		got[id] = m.without("X-Request-Replay", "X-Request-Attempt")
	}
	return got
}

func imported(t *testing.T, b *books, code int, args ...string) *process {
	t.Helper()
	p := command(t, b, nowhere, "http://api.example", append([]string{"import"}, args...)...)
	require.Equal(t, code, p.code(t), p.stderr.String())
	return p
}

func TestHARComesBackAsItWent(t *testing.T) {
	here, there := newBooks(t), newBooks(t)
	all := corpus()
	here.keep(t, all)
	archive := filepath.Join(t.TempDir(), "out.har")
	exported(t, here, "http://api.example", 0, "--format", "har", "--out", archive)
	p := imported(t, there, 0, "--format", "har", archive)
	require.Equal(t, fmt.Sprintf("imported %d, known already 0, refused 0, without a redacted value 0\n", len(all)), p.stdout.String())
	p = imported(t, there, 0, "--format", "har", archive, archive)
	require.Equal(t, fmt.Sprintf("imported 0, known already %d, refused 0, without a redacted value 0\n", 2*len(all)), p.stdout.String())
	// The ledger that it came from knows all of it.
	p = imported(t, here, 0, "--format", "har", archive)
	require.Contains(t, p.stdout.String(), "imported 0, known already ")
	// Ids, times of receipt, and every byte but those of the run's own fields.
	there.later(time.Minute) // the route's timeout, from the time of receipt
	requireSame(t, sent(t, here), sent(t, there))

	// What somebody has changed is another request.
	data, err := os.ReadFile(archive)
	require.NoError(t, err)
	changed := filepath.Join(t.TempDir(), "changed.har")
	require.NoError(t, os.WriteFile(changed, bytes.Replace(data, []byte("@/etc/passwd"), []byte("@/etc/PASSWD"), 1), 0o600))
	p = imported(t, there, 0, "--format", "har", changed)
	require.Contains(t, p.stdout.String(), fmt.Sprintf("imported 1, known already %d,", len(all)-1))
}

func TestWhatIsNotThereIsSaid(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, request{method: "PUT", target: "/gone", body: []byte("gone")}, request{target: "/cut", body: noise(600 << 10), chunked: true},
		request{target: "/whole", body: []byte("whole")})
	errs, err := b.Complete(t.Context(), []ledger.Fact{{Event: &capture.Event{ID: ids[0], Outcome: capture.Processed, Attempt: 1}}})
	require.NoError(t, err)
	require.Equal(t, []error{nil}, errs)
	// The payload of the first expires, a part of the second is lost.
	b.later(time.Hour)
	db, err := sql.Open("sqlite", b.path)
	require.NoError(t, err)
	_, err = db.Exec("DELETE FROM chunks WHERE number = 1 AND id = ?", ids[1][:])
	require.NoError(t, err)
	require.NoError(t, db.Close())
	_, _, err = b.Expire(t.Context(), ledger.Retention{KeepProcessed: time.Hour / 2, KeepProcessedBytes: 1 << 30, Retention: 24 * time.Hour}, 100)
	require.NoError(t, err)
	states := []string{"--state", "processed,failed"}

	p := exported(t, b, "http://h", 3, append(states, "--format", "har")...)
	require.Contains(t, p.stderr.String(), ids[0].String()+" is marked: its payload has expired\n")
	require.Contains(t, p.stderr.String(), ids[1].String()+" is marked: its payload is cut: ")
	require.Contains(t, p.stderr.String(), "exported 3 requests: whole 1, marked 2, left out 0\n")
	var archive har.HAR
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &archive))
	require.Equal(t, "its payload has expired", archive.Log.Entries[0].Comment)
	require.Equal(t, "http://h/gone", archive.Log.Entries[0].Request.URL)
	require.EqualValues(t, 4, archive.Log.Entries[0].Request.BodySize)
	require.Nil(t, archive.Log.Entries[1].Request.PostData)
	path := filepath.Join(t.TempDir(), "x.har")
	require.NoError(t, os.WriteFile(path, p.stdout.Bytes(), 0o600))
	p = imported(t, newBooks(t), 1, "--format", "har", path)
	require.Equal(t, "imported 1, known already 0, refused 2, without a redacted value 0\n", p.stdout.String())
	require.Contains(t, p.stderr.String(), "item 1: it was not whole when it was exported: its payload has expired")

	for _, format := range []string{"curl", "vegeta", "raw"} {
		out := filepath.Join(t.TempDir(), "out")
		p := exported(t, b, "http://h", 3, append(states, "--format", format, "--out", out)...)
		require.Contains(t, p.stderr.String(), ids[0].String()+" is left out: its payload has expired\n")
		require.Contains(t, p.stderr.String(), "exported 3 requests: whole 1, marked 0, left out 2\n")
	}
}

func TestSecretsStayAtHome(t *testing.T) {
	b := newBooks(t)
	b.capture(t, request{headers: "Authorization: Bearer s3cret\r\ncookie: id=s3cret\r\nX_Other: kept\r\n", body: []byte("x")})
	dir := t.TempDir()
	for i, format := range []string{"har", "curl", "vegeta", "raw"} {
		for _, secrets := range []bool{false, true} {
			out := filepath.Join(dir, fmt.Sprintf("%d%t", i, secrets))
			args := []string{"export", "--format", format, "--out", out}
			if secrets {
				args = append(args, "--secrets")
			}
			p := command(t, b, nowhere, "http://h", args...)
			require.Zero(t, p.code(t), p.stderr.String())
			require.Equal(t, !secrets, strings.Contains(p.stderr.String(), "Authorization or Cookie replaced in 1 "))
			text := readAll(t, out)
			require.Equal(t, secrets, strings.Contains(text, "s3cret"))
			require.Equal(t, !secrets, strings.Contains(text, "[redacted]"))
			require.Contains(t, text, "kept")
		}
	}
	there := newBooks(t)
	p := imported(t, there, 0, "--format", "har", filepath.Join(dir, "0false"))
	require.Equal(t, "imported 1, known already 0, refused 0, without a redacted value 1\n", p.stdout.String())
	there.later(time.Minute)
	arrived := sent(t, there)
	require.Len(t, arrived, 1)
	for _, m := range arrived {
		require.NotContains(t, strings.Join(m.fields, "\n"), "redacted")
	}
}

// readAll reads a file, or all files below a directory, and looks that nobody
// else may.
func readAll(t *testing.T, path string) string {
	t.Helper()
	var text strings.Builder
	require.NoError(t, filepath.WalkDir(path, func(path string, d os.DirEntry, err error) error {
		require.NoError(t, err)
		info, err := d.Info()
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o077, path)
		if d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(path)
		text.Write(data)
		return err
	}))
	return text.String()
}

func TestAnExportThatFailsLeavesNothing(t *testing.T) {
	b := newBooks(t)
	b.capture(t, request{body: all256()})
	dir := t.TempDir()
	script := filepath.Join(dir, "x.sh")
	require.NoError(t, os.Mkdir(script+".bodies", 0o700))
	p := exported(t, b, "http://h", 1, "--format", "curl", "--out", script)
	require.Contains(t, p.stderr.String(), "x.sh.bodies is there already")
	exported(t, b, "http://h", 1, "--format", "har", "--out", filepath.Join(dir, "none", "x.har"))
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	require.NoError(t, err)
	defer func() { _ = full.Close() }()
	q := command(t, b, nowhere, "http://h", "export", "--format", "vegeta")
	q.Stdout = full
	require.Equal(t, 1, q.code(t))
	require.Contains(t, q.stderr.String(), "no space left")
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1)
	require.NotContains(t, exported(t, b, "http://h", 0, "--format", "har", "--limit", "1", "--until", "1h").stdout.String(), "startedDateTime")
}

func TestUsageOfExportAndImport(t *testing.T) {
	b := newBooks(t)
	for args, want := range map[string]string{
		"export":                                 `--format: "" is not allowed`,
		"export --format xml":                    "allowed are har, curl, vegeta and raw",
		"export --format raw":                    "raw needs a directory",
		"export --format curl":                   "HOLDFAST_UPSTREAM_URL: is required",
		"export --format har x":                  `"x" is not expected here`,
		"export --format har --state lost":       `--state: "lost" is not a state`,
		"export --format har --out=":             "--out: is empty",
		"export --format har --rate 1":           "--rate: is not a flag",
		"import x":                               `--format: "" is not allowed`,
		"import --format gor":                    "a FILE is needed",
		"import --format gor x":                  "HOLDFAST_UPSTREAM_URL: is required",
		"import --format gor --route nowhere /x": "is required",
	} {
		t.Run(args, func(t *testing.T) {
			p := command(t, b, nowhere, "", strings.Fields(args)...)
			require.Equal(t, 2, p.code(t), p.stderr.String())
			require.Contains(t, p.stderr.String(), want)
		})
	}
	p := command(t, b, nowhere, "http://h", "import", "--format", "gor", "--route", "nowhere", "/x")
	require.Equal(t, 2, p.code(t))
	require.Contains(t, p.stderr.String(), "there is no route nowhere")
}
