package edge_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/mccutchen/go-httpbin/v2/httpbin"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
)

// sockets is an API that speaks WebSocket.
type sockets struct {
	t      *testing.T
	closed chan websocket.StatusCode // how clients closed their connections to /echo
	push   chan string               // what the server says on /push
}

func (s *sockets) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/plain" {
		_, _ = io.Copy(io.Discard, r.Body) // an empty answer will do
		return
	}
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"chat"}})
	if err != nil {
		return // it has answered
	}
	defer func() { _ = c.CloseNow() }() // whatever the client did
	c.SetReadLimit(4 * mib)
	ctx := r.Context()
	switch r.URL.Path {
	case "/push":
		for text := range s.push {
			if c.Write(ctx, websocket.MessageText, []byte(text)) != nil {
				return
			}
		}
		_ = c.Close(4001, "no more")
	case "/vanish":
		_, _, _ = c.Read(ctx)
	default:
		for {
			kind, message, err := c.Read(ctx)
			if err != nil {
				s.closed <- websocket.CloseStatus(err)
				return
			}
			if c.Write(ctx, kind, message) != nil {
				return
			}
		}
	}
}

// socketWay is how a WebSocket client reaches the ingress.
type socketWay struct {
	name, url string
	system    *harness.System
	client    *http.Client
	api       *sockets
}

// socketWays are ws and wss, with an API of its own for each. Everything is
// captured that can be.
func socketWays(t *testing.T) []socketWay {
	t.Helper()
	p := newPKI(t)
	with := func(name string, start func(api string) *harness.System, config *tls.Config) socketWay {
		api := &sockets{t: t, closed: make(chan websocket.StatusCode, 10), push: make(chan string)}
		s := start(startAPI(t, api))
		scheme := map[bool]string{true: "wss://", false: "ws://"}[config != nil]
		w := newWay(t, name, "", config)
		w.client.Timeout = 0 // it would end the connection
		return socketWay{name, scheme + ingressAddr(s), s, w.client, api}
	}
	return []socketWay{
		with("ws", func(api string) *harness.System { return startSystem(t, api, "CAPTURE_METHODS=*") }, nil),
		with("wss", func(api string) *harness.System { return startTLS(t, p, api, "CAPTURE_METHODS=*") }, p.config()),
	}
}

func (w socketWay) dial(ctx context.Context, t *testing.T, path string) *websocket.Conn {
	t.Helper()
	c, resp, err := websocket.Dial(ctx, w.url+path, &websocket.DialOptions{HTTPClient: w.client, Subprotocols: []string{"chat"}})
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.CloseNow() }) // it may be closed
	require.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
	require.Len(t, resp.Header.Get("X-Request-Uuid"), 36)
	require.NotContains(t, resp.Header, "X-Request-Stored")
	require.Equal(t, "chat", c.Subprotocol())
	c.SetReadLimit(4 * mib)
	return c
}

// TestWebSocket talks through the ingress to an API, and ends connections from
// either side.
func TestWebSocket(t *testing.T) {
	t.Parallel()
	for _, w := range socketWays(t) {
		t.Run(w.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			t.Run("messages", func(t *testing.T) {
				c := w.dial(ctx, t, "/echo")
				for _, m := range []struct {
					kind websocket.MessageType
					body []byte
				}{
					{websocket.MessageText, []byte("text, ü")}, {websocket.MessageBinary, []byte{0, 255, '\r', '\n'}},
					{websocket.MessageText, nil}, {websocket.MessageBinary, pseudorandom(mib)},
				} {
					require.NoError(t, c.Write(ctx, m.kind, m.body))
					kind, body, err := c.Read(ctx)
					require.NoError(t, err)
					require.Equal(t, m.kind, kind)
					require.True(t, bytes.Equal(m.body, body))
				}
				reading := c.CloseRead(ctx) // a pong has to be read
				require.NoError(t, c.Ping(reading))
				require.NoError(t, c.Close(4002, "enough"))
				require.Equal(t, websocket.StatusCode(4002), receive(t, w.api.closed))
			})
			t.Run("the server speaks first, and ends it", func(t *testing.T) {
				c := w.dial(ctx, t, "/push")
				for _, text := range []string{"one", "two", "three"} {
					w.api.push <- text
					_, body, err := c.Read(ctx) // before the server says the next
					require.NoError(t, err)
					require.Equal(t, text, string(body))
				}
				close(w.api.push)
				_, _, err := c.Read(ctx)
				var closed websocket.CloseError
				require.ErrorAs(t, err, &closed)
				require.Equal(t, websocket.CloseError{Code: 4001, Reason: "no more"}, closed)
			})
			t.Run("the client vanishes", func(t *testing.T) {
				require.NoError(t, w.dial(ctx, t, "/echo").CloseNow())
				require.Equal(t, websocket.StatusCode(-1), receive(t, w.api.closed), "no close frame came")
			})
			t.Run("the server vanishes", func(t *testing.T) {
				c := w.dial(ctx, t, "/vanish")
				require.NoError(t, c.Write(ctx, websocket.MessageText, []byte("go")))
				_, _, err := c.Read(ctx)
				require.Error(t, err)
				require.Equal(t, websocket.StatusCode(-1), websocket.CloseStatus(err))
			})
			t.Run("nothing of it is captured", func(t *testing.T) {
				plain := way{url: "http" + strings.TrimPrefix(w.url, "ws"), proto: "HTTP/1.1", client: w.client}
				a := plain.do(t, plain.request(ctx, t, http.MethodGet, "/plain", nil))
				require.Equal(t, "synced", a.header.Get("X-Request-Stored"))
				require.Len(t, captured(t, w.system, a.header.Get("X-Request-Uuid")), 1)
			})
		})
	}
}

// TestWebSocketHTTPBin uses httpbin's own echo, whose WebSocket is of another make.
func TestWebSocketHTTPBin(t *testing.T) {
	t.Parallel()
	addr := startIngress(t, startAPI(t, httpbin.New()))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	w := newWay(t, "ws", "", nil)
	w.client.Timeout = 0
	c, _, err := websocket.Dial(ctx, "ws://"+addr+"/websocket/echo", &websocket.DialOptions{HTTPClient: w.client})
	require.NoError(t, err)
	defer func() { _ = c.CloseNow() }() // it may be closed
	for i := range 10 {
		text := fmt.Sprint("message ", i)
		require.NoError(t, c.Write(ctx, websocket.MessageText, []byte(text)))
		_, body, err := c.Read(ctx)
		require.NoError(t, err)
		require.Equal(t, text, string(body))
	}
	require.NoError(t, c.Close(websocket.StatusNormalClosure, ""))
}

// switcher is an API that changes to whatever protocol it is asked for, says so,
// and gives back each line in upper case. A path that it does not like it
// refuses.
type switcher struct {
	seen  chan http.Header
	ended chan error
}

func (s switcher) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // what was sent does not matter
	s.seen <- r.Header.Clone()
	protocol := r.Header.Get("Upgrade")
	if protocol == "" || r.URL.Path == "/refused" {
		w.Header().Set("X-Upgraded", "no")
		if r.URL.Path == "/refused" {
			w.Header().Set("Upgrade", "other/1")
			w.Header().Set("Connection", "Upgrade")
			w.WriteHeader(http.StatusUpgradeRequired)
		}
		_, _ = io.WriteString(w, "plain") // a client that has gone needs no answer
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.ended <- err
		return
	}
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: %s\r\nX-From-Api: yes\r\n\r\nhello\n", protocol)
	for err == nil {
		var line string
		if line, err = rw.ReadString('\n'); err == nil {
			_, err = io.WriteString(conn, strings.ToUpper(line))
		}
		if line == "bye\n" {
			break
		}
	}
	s.ended <- err
}

// TestUpgrade passes protocols that the ingress does not know.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	api := switcher{make(chan http.Header, 10), make(chan error, 10)}
	s := startSystem(t, startAPI(t, api))
	dial := func(t *testing.T) (net.Conn, *bufio.Reader) {
		t.Helper()
		conn, err := net.Dial("tcp", ingressAddr(s))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() }) // the test may have closed it
		require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
		return conn, bufio.NewReader(conn)
	}
	send := func(t *testing.T, conn net.Conn, r *bufio.Reader, text string) *http.Response {
		t.Helper()
		_, err := io.WriteString(conn, text)
		require.NoError(t, err)
		resp, err := http.ReadResponse(r, nil)
		require.NoError(t, err)
		return resp
	}
	line := func(t *testing.T, r *bufio.Reader) string {
		t.Helper()
		text, err := r.ReadString('\n')
		require.NoError(t, err)
		return text
	}
	const head = "Host: a\r\nConnection: keep-alive, Upgrade\r\n"

	for _, end := range []string{"client", "server"} {
		t.Run("passes until the "+end+" ends it", func(t *testing.T) {
			conn, r := dial(t)
			// The client does not wait for the answer before it speaks the new protocol.
			resp := send(t, conn, r, "GET /u HTTP/1.1\r\n"+head+"Upgrade: odd/7\r\n\r\nearly\n")
			require.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
			require.Equal(t, "odd/7", resp.Header.Get("Upgrade"))
			require.Equal(t, "upgrade", strings.ToLower(resp.Header.Get("Connection")))
			require.Equal(t, "yes", resp.Header.Get("X-From-Api"))
			require.Len(t, resp.Header.Get("X-Request-Uuid"), 36)
			require.Equal(t, "odd/7", receive(t, api.seen).Get("Upgrade"))
			require.Equal(t, "hello\n", line(t, r))
			require.Equal(t, "EARLY\n", line(t, r))
			_, err := io.WriteString(conn, "more\n")
			require.NoError(t, err)
			require.Equal(t, "MORE\n", line(t, r))
			if end == "server" {
				_, err = io.WriteString(conn, "bye\n")
				require.NoError(t, err)
				require.Equal(t, "BYE\n", line(t, r))
				_, err = r.ReadByte()
				require.ErrorIs(t, err, io.EOF)
				require.NoError(t, receive(t, api.ended))
				return
			}
			require.NoError(t, conn.Close())
			require.Error(t, receive(t, api.ended))
		})
	}
	t.Run("the API declines", func(t *testing.T) {
		conn, r := dial(t)
		resp := send(t, conn, r, "GET /refused HTTP/1.1\r\n"+head+"Upgrade: odd/7\r\n\r\n")
		require.Equal(t, http.StatusUpgradeRequired, resp.StatusCode)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, "plain", string(body))
		receive(t, api.seen)
	})
	ignored := map[string]string{
		"POST is captured":                 "POST /u HTTP/1.1\r\n" + head + "Upgrade: odd/7\r\nContent-Length: 1\r\n\r\nx",
		"POST asks for h2c, as curl does":  "POST /u HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nContent-Length: 1\r\n\r\nx",
		"GET asks for h2c":                 "GET /u HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n",
		"POST says websocket":              "POST /u HTTP/1.1\r\n" + head + "Upgrade: websocket\r\nContent-Length: 0\r\n\r\n",
		"Connection does not name Upgrade": "GET /u HTTP/1.1\r\nHost: a\r\nUpgrade: odd/7\r\n\r\n",
		"HTTP/1.0":                         "GET /u HTTP/1.0\r\n" + head + "Upgrade: odd/7\r\n\r\n",
	}
	for name, text := range ignored {
		t.Run("ignored: "+name, func(t *testing.T) {
			conn, r := dial(t)
			resp := send(t, conn, r, text)
			require.Equal(t, http.StatusOK, resp.StatusCode)
			require.Equal(t, "no", resp.Header.Get("X-Upgraded"))
			require.Equal(t, map[bool]string{true: "synced"}[strings.HasPrefix(text, "POST")], resp.Header.Get("X-Request-Stored"))
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			require.Equal(t, "plain", string(body))
			got := receive(t, api.seen)
			for _, name := range []string{"Upgrade", "Http2-Settings", "Connection"} {
				require.NotContains(t, got, name)
			}
		})
	}
	require.Empty(t, api.seen)
}

// TestUpgradeWithoutAPI answers an upgrade for an API that is not there.
func TestUpgradeWithoutAPI(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_ = c.Close() // without a word
			}
		}
	}()
	t.Cleanup(func() { _ = l.Close() })
	addr := startIngress(t, "http://"+l.Addr().String())
	w := newWay(t, "plain", "http://"+addr, nil)
	a := w.do(t, w.request(t.Context(), t, http.MethodGet, "/ws", nil, "Connection", "Upgrade", "Upgrade", "websocket",
		"Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="))
	problem(t, a, http.StatusBadGateway)
}
