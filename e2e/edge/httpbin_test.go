package edge_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/mccutchen/go-httpbin/v2/httpbin"
	"github.com/stretchr/testify/require"
)

const (
	mib = 1 << 20
	// maxBody is the default of MAX_BODY_BYTES.
	maxBody = 32 * mib
	binHost = "bin.example.com"
)

// call is one request to httpbin, sent to it directly and through the ingress.
type call struct {
	method, target string
	body           []byte
	header         []string // name, value, name, value
	// chunked sends the body without telling its length. What httpbin says of
	// the framing differs then: the ingress reads such a body in full.
	chunked bool
	// noHead leaves out the HEAD request that follows every GET.
	noHead bool
	// vary are the parts of the answer's body that differ with each request.
	vary string
	// varying are headers and trailers of which only the presence is compared.
	varying []string
}

// seen is what reached httpbin through the ingress.
type seen struct {
	mu       sync.Mutex
	arrivals int
	bad      []string
}

// watch checks what the ingress adds to every request. What came by it is known
// by its Via.
func (s *seen) watch(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if via := r.Header.Values("Via"); via != nil {
			h := r.Header
			s.mu.Lock()
			s.arrivals++
			ok := len(via) == 1 && strings.HasSuffix(via[0], " holdfast") &&
				len(h["X-Request-Uuid"]) == 1 && len(h.Get("X-Request-Uuid")) == 36 &&
				slices.Equal(h["X-Forwarded-For"], []string{"127.0.0.1"}) &&
				slices.Equal(h["X-Forwarded-Host"], []string{binHost}) &&
				len(h["X-Forwarded-Proto"]) == 1 && r.Host == binHost
			if !ok {
				s.bad = append(s.bad, fmt.Sprintf("%s %s %s %v", r.Method, r.RequestURI, r.Host, h))
			}
			s.mu.Unlock()
		}
		next.ServeHTTP(w, r)
	})
}

func pseudorandom(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b) // it never fails
	return b
}

// calls are httpbin's own endpoints.
func calls(t *testing.T) []call {
	t.Helper()
	get := func(target string, header ...string) call {
		return call{method: http.MethodGet, target: target, header: header}
	}
	send := func(method, target, contentType string, body []byte) call {
		return call{method: method, target: target, body: body, header: []string{"Content-Type", contentType}}
	}
	all := []call{
		get("/"), get("/get"), get("/get?a=1&a=2&b=%2F&empty"), get("/get?"), get("/headers", "X-Twice", "1", "X-Twice", "2", "X-Empty", ""),
		get("/anything"), get("/anything/a%2Fb//c/../d;x=1?q=%zz"), get("/ip"), get("/user-agent"), get("/hostname"), get("/html"),
		get("/json"), get("/jsonl?count=5"), get("/xml"), get("/robots.txt"), get("/deny"), get("/encoding/utf8"), get("/forms/post"),
		get("/image", "Accept", "image/webp"), get("/image/png"), get("/image/svg"), get("/image/avif"), get("/env"), get("/version"),
		get("/base64/aG9sZGZhc3Q="), get("/links/3/1"), get("/links/3"), get("/nowhere"), get("/delete"),
		get("/redirect/3"), get("/redirect/3?absolute=true"), get("/relative-redirect/2"), get("/absolute-redirect/2"),
		get("/redirect-to?url=http://elsewhere.example/%3Fa%3Db&status_code=307"),
		get("/range/1000"), get("/range/1000", "Range", "bytes=10-19"), get("/range/1000", "Range", "bytes=-5"),
		get("/range/1000", "Range", "bytes=2000-"), get("/range/100000", "Range", "bytes=50000-"),
		get("/range/1000", "Range", "bytes=10-19", "If-Range", "range1000"),
		get("/bytes/1?seed=1"), get("/bytes/16384?seed=1"), get("/bytes/16385?seed=1"), get("/bytes/1000000?seed=1"), get("/bytes/0"),
		get("/stream-bytes/100000?seed=1&chunk_size=1000"), get("/stream-bytes/10?seed=1&chunk_size=1"), get("/stream-bytes/4000000?seed=1"),
		get("/stream/1"), get("/stream/100"), get("/drip?duration=2ms&delay=0&numbytes=4"), get("/drip?duration=0&delay=0&numbytes=100000&code=206"),
		get("/delay/0.001"), get("/cookies", "Cookie", "a=1; b=2"), get("/cookies/set?a=1"),
		get("/gzip"), get("/deflate"), get("/brotli"),
		get("/etag/one", "If-None-Match", `"one"`), get("/etag/one", "If-Match", `"two"`),
		get("/cache", "If-None-Match", `"any"`), get("/cache/60"),
		get("/basic-auth/u/p"), get("/basic-auth/u/p", "Authorization", "Basic dTpw"), get("/hidden-basic-auth/u/p"),
		get("/bearer"), get("/bearer", "Authorization", "Bearer token"),
		get("/trailers?X-One=1&X-Two=2"), get("/trailers"),
		get("/response-headers?X-Own=a&X-Own=b&Content-Type=text/plain&X-Empty="),
		get("/response-headers?Set-Cookie=a%3D1&Set-Cookie=b%3D2&Warning=199+-+odd"),
		get("/unstable?failure_rate=0"), get("/unstable?failure_rate=1"),

		{method: http.MethodGet, target: "/sse?count=3&duration=3ms&delay=0", vary: `"timestamp":\d+`, noHead: true, varying: []string{"Server-Timing"}},
		{method: http.MethodGet, target: "/uuid", vary: `[0-9a-f-]{36}`},
		{method: http.MethodGet, target: "/etag/one", varying: []string{"Last-Modified"}},
		{method: http.MethodGet, target: "/cache", varying: []string{"Last-Modified", "Etag"}},
		{method: http.MethodGet, target: "/cookies/delete?a", varying: []string{"Set-Cookie"}},
		{method: http.MethodGet, target: "/digest-auth/auth/u/p", varying: []string{"Www-Authenticate"}},
		{method: http.MethodGet, target: "/dump/request", vary: `(?m)^(Via|X-Forwarded-[A-Za-z]+|X-Request-Uuid): .*\r\n`},
		{method: http.MethodHead, target: "/head"},
		{method: http.MethodOptions, target: "/anything", header: []string{"Origin", "http://a.example", "Access-Control-Request-Headers", "x-a"}},
		{method: "M-SEARCH", target: "/anything"},
		{method: http.MethodGet, target: "/anything", body: []byte("a body that nobody expects"), noHead: true},

		{method: http.MethodPost, target: "/post"}, {method: http.MethodDelete, target: "/delete"},
		{method: http.MethodPost, target: "/get"}, // 405 with Allow
		send("DELETE", "/delete", "text/plain", []byte("why")),
		send("POST", "/trailers?X-Late=yes", "text/plain", []byte("x")),
		send("POST", "/stream/20", "text/plain", []byte("x")), send("POST", "/redirect/1", "text/plain", []byte("x")),
		send("POST", "/bytes/300000?seed=2", "text/plain", []byte("x")), send("POST", "/unstable?failure_rate=1", "text/plain", []byte("x")),
		send("POST", "/gzip", "text/plain", []byte("x")), send("POST", "/cookies/set?c=3", "text/plain", []byte("x")),
		send("POST", "/response-headers?X-Own=a&X-Own=b", "text/plain", []byte("x")),
		send("POST", "/post", "application/octet-stream", pseudorandom(8*mib)),
		send("PUT", "/anything", "application/octet-stream", pseudorandom(300<<10)),
		send("POST", "/upload", "application/octet-stream", pseudorandom(maxBody)),
	}
	var form bytes.Buffer
	mw := multipart.NewWriter(&form)
	require.NoError(t, mw.SetBoundary("the-boundary"))
	part, err := mw.CreateFormFile("file", "odd \"name\".bin")
	require.NoError(t, err)
	_, err = part.Write(pseudorandom(100_000))
	require.NoError(t, err)
	require.NoError(t, mw.Close())
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		for _, c := range []call{
			send(method, "/anything?x=1", "application/x-www-form-urlencoded", []byte("a=1&a=2&b=%20")),
			send(method, "/anything", "application/json", []byte(`{"a": [1, 2, "\u0000"]}`)),
			send(method, "/anything", mw.FormDataContentType(), form.Bytes()),
			send(method, "/"+strings.ToLower(method), "application/octet-stream", []byte{0, 1, 2, 255, '\r', '\n'}),
		} {
			all = append(all, c)
			c.chunked = true
			all = append(all, c)
		}
	}
	all = append(all, call{method: "PUT", target: "/upload", body: pseudorandom(5 * mib), chunked: true})
	for _, code := range []int{
		102, 103, 200, 201, 202, 203, 204, 205, 206, 207, 226, 299, 300, 301, 302, 303, 304, 305, 307, 308, 400, 401, 402, 403, 404, 405,
		406, 407, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 425, 426, 428, 429, 431, 451, 499, 500, 501, 502, 503,
		504, 505, 511, 599,
	} {
		target := "/status/" + strconv.Itoa(code)
		all = append(all, get(target), send("POST", target, "text/plain", []byte("x")))
	}
	return all
}

// TestHTTPBin sends httpbin's whole repertoire to it and through the ingress: the
// answers are the same, but for what the ingress says it changes.
func TestHTTPBin(t *testing.T) {
	t.Parallel()
	var watched seen
	api := startAPI(t, watched.watch(httpbin.New(
		httpbin.WithMaxBodySize(64*mib), httpbin.WithEnv(map[string]string{"HTTPBIN_A": "b"}),
		// What the ingress adds is checked by watch, and not echoed.
		httpbin.WithExcludeHeaders("via,x-forwarded-for,x-forwarded-host,x-forwarded-proto,x-request-uuid"),
	)))
	p := newPKI(t)
	plain := newWay(t, "HTTP/1.1", startSystem(t, api).IngressURL(), nil)
	http1, http2 := p.ways(ingressAddr(startTLS(t, p, api)))
	direct := newWay(t, "direct", api, nil)
	sent := 0
	for _, w := range []way{plain, http1, http2} {
		scheme, _, _ := strings.Cut(w.url, ":")
		t.Run(w.name, func(t *testing.T) {
			for _, c := range calls(t) {
				methods := []string{c.method}
				if c.method == http.MethodGet && !c.noHead && c.body == nil {
					methods = append(methods, http.MethodHead)
				}
				for _, method := range methods {
					c.method = method
					t.Run(c.name(), func(t *testing.T) {
						want := direct.do(t, c.request(t, direct, "X-Forwarded-Proto", scheme))
						got := w.do(t, c.request(t, w))
						sent++
						c.compare(t, want, got)
					})
				}
			}
			t.Run("a body above the limit", func(t *testing.T) {
				refused := w.do(t, call{method: "POST", target: "/upload", body: make([]byte, maxBody+1), chunked: true}.request(t, w))
				problem(t, refused, http.StatusRequestEntityTooLarge)
			})
		})
	}
	require.Empty(t, watched.bad, "each has what the ingress adds, once")
	require.Equal(t, sent, watched.arrivals, "nothing came twice, and nothing that was refused")
}

func (c call) name() string {
	name := c.method + " " + c.target
	if len(c.header) > 0 {
		name += " " + strings.Join(c.header, " ")
	}
	if c.chunked {
		name += " chunked"
	}
	return strings.ReplaceAll(name, "/", "|")
}

func (c call) request(t *testing.T, w way, header ...string) *http.Request {
	t.Helper()
	var body io.Reader
	if c.body != nil {
		body = bytes.NewReader(c.body)
	}
	if c.chunked {
		body = io.MultiReader(body) // no type whose length is known
	}
	r := w.request(t.Context(), t, c.method, "/", body, append(header, c.header...)...)
	// As it stands here: net/url would refuse some of them.
	r.URL.Opaque = c.target
	if strings.HasPrefix(c.target, "//") || w.proto == "HTTP/2.0" {
		r.URL.Opaque = ""
		r.URL.Path, r.URL.RawQuery, _ = strings.Cut(c.target, "?")
		r.URL.ForceQuery = strings.HasSuffix(c.target, "?")
		if strings.Contains(r.URL.Path, "%") {
			r.URL.RawPath = r.URL.Path
			r.URL.Path = strings.ReplaceAll(r.URL.Path, "%2F", "/")
		}
	}
	r.Host = binHost
	r.Header.Set("User-Agent", "edge")
	return r
}

// captured says whether the ingress stores the request.
func (c call) captured() bool {
	return slices.Contains([]string{"POST", "PUT", "PATCH", "DELETE"}, c.method)
}

// compare holds the answer through the ingress to the direct one.
func (c call) compare(t *testing.T, want, got answer) {
	t.Helper()
	require.Equal(t, want.status, got.status)
	require.Equal(t, want.interim, got.interim)
	require.Equal(t, c.withoutVarying(want.trailer), c.withoutVarying(got.trailer))

	// What the ingress adds.
	require.Equal(t, []string{"1.1 holdfast"}, got.header["Via"])
	require.Len(t, got.header["X-Request-Uuid"], 1)
	require.Len(t, got.header.Get("X-Request-Uuid"), 36)
	if c.captured() {
		require.Equal(t, []string{"synced"}, got.header["X-Request-Stored"])
	} else {
		require.NotContains(t, got.header, "X-Request-Stored")
	}
	require.Len(t, got.header["Date"], 1)

	// What the framing of the request makes httpbin say differs, and with it the
	// length of its answer.
	framing := c.chunked || c.captured() && c.body == nil
	same := func(h http.Header) http.Header {
		h = c.withoutVarying(h)
		for _, name := range []string{"Via", "X-Request-Uuid", "X-Request-Stored", "Date", "Content-Length"} {
			h.Del(name)
		}
		// Both end at the next hop; Trailer is left in an answer to HEAD, which has no
		// trailers, the other belongs to a 407.
		h.Del("Trailer")
		h.Del("Proxy-Authenticate")
		return h
	}
	require.Equal(t, same(want.header), same(got.header))
	switch {
	case framing:
		require.Equal(t, withoutFraming(want.body), withoutFraming(got.body))
		return
	case c.vary != "":
		vary := regexp.MustCompile(c.vary)
		require.Equal(t, vary.ReplaceAllString(string(want.body), ""), vary.ReplaceAllString(string(got.body), ""))
		return
	}
	require.True(t, bytes.Equal(want.body, got.body), "the body differs:\n%.2000s\n%.2000s", want.body, got.body)
	if want.length < 0 && c.method != http.MethodHead && got.length >= 0 {
		// An answer of unknown length that was here whole may get one.
		require.Len(t, got.body, int(got.length))
		return
	}
	require.Equal(t, want.length, got.length)
	require.Equal(t, want.header["Content-Length"], got.header["Content-Length"])
}

// withoutVarying is a header in which what varies is only there.
func (c call) withoutVarying(h http.Header) http.Header {
	h = h.Clone()
	for _, name := range c.varying {
		if h[name] != nil {
			h[name] = []string{"some"}
		}
	}
	return h
}

// withoutFraming is a JSON echo of a request without the headers that tell where
// its body ends; what is not JSON is left alone.
func withoutFraming(body []byte) any {
	var echo map[string]any
	if json.Unmarshal(body, &echo) != nil {
		return string(body)
	}
	if headers, ok := echo["headers"].(map[string]any); ok {
		delete(headers, "Content-Length")
		delete(headers, "Transfer-Encoding")
	}
	return echo
}
