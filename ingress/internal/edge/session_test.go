package edge

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

func TestConnectionsAreKept(t *testing.T) {
	s := start(t, echo)
	c := s.dial()
	for n := range 5 {
		c.send(get(fmt.Sprintf("/%d", n)))
		a := c.receive()
		require.Equal(t, fmt.Sprintf("/%d ", n), a.text)
		require.False(t, a.Close)
		require.NotEmpty(t, a.Header.Get("Date"))
		c.send(post("/p", strings.Repeat("x", 10000)))
		require.Len(t, c.receive().text, 10003)
	}
	require.EqualValues(t, 1, s.metric("holdfast_connections"))
	c.send(get("/", "Connection: close"))
	require.True(t, c.receive().Close)
	c.ends()
}

// pipelined are ten requests of every framing.
func pipelined() (text string, want []string) {
	for n := range 10 {
		target := fmt.Sprintf("/%d", n)
		switch n % 3 {
		case 0:
			text += get(target)
			want = append(want, target+" ")
		case 1:
			text += post(target, "counted")
			want = append(want, target+" counted")
		default:
			text += "POST " + target + " HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nchu\r\n3\r\nnks\r\n0\r\nX-T: v\r\n\r\n"
			want = append(want, target+" chunks")
		}
	}
	return text, want
}

func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	s := start(t, echo)
	text, want := pipelined()
	for name, size := range map[string]int{"at once": len(text), "byte by byte": 1, "in pieces": 13} {
		t.Run(name, func(t *testing.T) {
			c := s.dial()
			for rest := text; rest != ""; {
				n := min(size, len(rest))
				c.send(rest[:n])
				rest = rest[n:]
			}
			for _, w := range want {
				require.Equal(t, w, c.receive().text)
			}
		})
	}
	// The server needs nothing of them any more.
	require.Zero(t, s.metric("holdfast_panics_total"))
}

func TestHTTP10(t *testing.T) {
	s := start(t, func(x *Exchange) {
		if x.Request.Target == "/chunked" {
			x.Head(200, "OK", x.Answer, wire.Chunked)
			_ = x.Interim(103, "Early Hints", nil) // too late
			_ = x.Write([]byte("until "))
			_ = x.Write([]byte("close"))
			_ = x.End(wire.Fields{}.Add("X-T", "v"))
			return
		}
		_ = x.Interim(103, "Early Hints", nil) // HTTP/1.0 knows none
		echo(x)
	})
	c := s.dial()
	c.send("GET /kept HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
	a := c.receive()
	require.Equal(t, "/kept ", a.text)
	require.Equal(t, "keep-alive", a.Header.Get("Connection"))
	c.send("GET /chunked HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
	a = c.receive()
	require.Equal(t, "until close", a.text)
	require.Empty(t, a.TransferEncoding)
	require.Empty(t, a.Header.Get("X-T"))
	c.ends()

	c = s.dial()
	c.send("GET / HTTP/1.0\r\n\r\n")
	require.True(t, c.receive().Close)
	c.ends()
}

func TestAnswersWithoutBody(t *testing.T) {
	s := start(t, func(x *Exchange) {
		switch x.Request.Target {
		case "/204":
			x.Head(204, "No Content", x.Answer, 5)
		case "/304":
			x.Head(304, "Not Modified", x.Answer, 5)
		case "/nothing":
			x.Head(200, "OK", x.Answer, NoBody)
		case "/chunked":
			x.Head(200, "OK", x.Answer, wire.Chunked)
		default:
			x.Head(200, "OK", x.Answer, 5)
		}
		_ = x.Write([]byte("hello"))
		_ = x.End(wire.Fields{}.Add("X-T", "v"))
	})
	c := s.dial()
	for _, q := range []struct{ method, target, length string }{
		{"GET", "/204", ""}, {"GET", "/304", "5"}, {"HEAD", "/", "5"}, {"HEAD", "/chunked", ""}, {"HEAD", "/nothing", ""}, {"HEAD", "/204", ""},
	} {
		c.send(strings.Replace(get(q.target), "GET", q.method, 1))
		a := c.receiveTo(q.method)
		require.Equal(t, q.length, a.Header.Get("Content-Length"), "%s %s", q.method, q.target)
		require.Empty(t, a.Header.Get("Transfer-Encoding"))
		require.Empty(t, a.text)
	}
	c.send(get("/"))
	require.Equal(t, "hello", c.receive().text)
}

func TestChunkedAnswerWithTrailers(t *testing.T) {
	s := start(t, func(x *Exchange) {
		_ = x.Interim(103, "Early Hints", wire.Fields{}.Add("Link", "l"))
		x.Head(200, "All Right", append(x.Answer, wire.Field{Name: "x-A", Value: "1"}), wire.Chunked)
		for _, size := range []int{1, 5, flushBytes, 3 * flushBytes, 2} {
			_ = x.Write(nil)
			_ = x.Write([]byte(strings.Repeat("x", size)))
		}
		_ = x.End(wire.Fields{}.Add("X-T", "v"))
		_ = x.End(nil)
	})
	c := s.dial()
	for range 3 {
		c.send(get("/"))
		require.Equal(t, 103, c.receive().StatusCode)
		a := c.receive()
		require.Equal(t, "200 All Right", a.Status)
		require.Len(t, a.text, 8+4*flushBytes)
		require.Equal(t, "v", a.Trailer.Get("X-T"))
	}
}

func TestExpectationIsMetWhenTheBodyIsRead(t *testing.T) {
	reads := make(chan bool)
	s := start(t, func(x *Exchange) {
		if x.Request.Target == "/unread" {
			reply(x, 403, "no")
			return
		}
		<-reads
		echo(x)
	})
	c := s.dial()
	c.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
	require.True(t, c.silent(5*time.Millisecond), "nobody reads yet")
	reads <- true
	require.Equal(t, 100, c.receive().StatusCode)
	c.send("hello")
	require.Equal(t, "/ hello", c.receive().text)

	// Who does not wait needs no word.
	c.send("POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello")
	reads <- true
	require.Equal(t, "/ hello", c.receive().text)

	// Where the body is not asked for nobody knows whether it comes.
	c.send("POST /unread HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
	a := c.receive()
	require.Equal(t, 403, a.StatusCode)
	require.True(t, a.Close)
	c.ends()
}

func TestBodyThatTheHandlerDoesNotRead(t *testing.T) {
	s := start(t, func(x *Exchange) { reply(x, 200, "unread") })
	c := s.dial()
	c.send(post("/small", strings.Repeat("x", restBytes)))
	a := c.receive()
	require.False(t, a.Close)
	c.send(post("/next", ""))
	require.False(t, c.receive().Close)

	// A client that is still sending a large one gets the whole answer.
	const large = 8 << 20
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c.Conn, post("/large", strings.Repeat("x", large)))
		sent <- err
	}()
	a = c.receive()
	require.True(t, a.Close)
	require.Equal(t, "unread", a.text)
	require.NoError(t, <-sent)
	c.ends()

	// Of chunks nobody knows how many come.
	c = s.dial()
	c.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
	require.True(t, c.receive().Close)
	c.send("0\r\n\r\n")
	c.ends()
}

func TestLingeringIsBounded(t *testing.T) {
	for name, bound := range map[string]func(s *server){
		"by a pause":  func(s *server) { s.times.lingerPause = soon },
		"as a whole":  func(s *server) { s.times.linger = soon },
		"by its stop": func(s *server) {},
	} {
		t.Run(name, func(t *testing.T) {
			s := prepare(t, func(x *Exchange) { reply(x, 200, "") })
			bound(s)
			s.run()
			c := s.dial()
			c.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
			require.True(t, c.receive().Close)
			c.ends() // the server has said all
			if name == "by its stop" {
				return // which the test's end is
			}
			require.Eventually(t, func() bool { return s.open() == 0 }, patience, time.Millisecond)
		})
	}
}

func TestRefusals(t *testing.T) {
	s := start(t, echo)
	for name, c := range map[string]struct {
		text   string
		status int
	}{
		"no HTTP":         {"\x16\x03\x01\x02\x00", 400},
		"a bad line":      {"GET /\n\n", 400},
		"no Host":         {"GET / HTTP/1.1\r\n\r\n", 400},
		"too large":       {get("/", "A: "+strings.Repeat("x", 9000)), 431},
		"many fields":     {get("/", strings.Split(strings.Repeat("A:,", 33), ",")[:33]...), 431},
		"a version":       {"GET / HTTP/3.0\r\n\r\n", 505},
		"a coding":        {get("/", "Transfer-Encoding: gzip"), 501},
		"an expectation":  {get("/", "Expect: x"), 417},
		"HTTP/1.0 coding": {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
	} {
		t.Run(name, func(t *testing.T) {
			conn := s.dial()
			conn.send(get("/before")) // a connection that is kept is refused as well
			require.Equal(t, 200, conn.receive().StatusCode)
			conn.send(c.text + "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n")
			a := conn.receive()
			require.Equal(t, c.status, a.StatusCode)
			require.True(t, a.Close)
			require.NotEmpty(t, a.text)
			conn.ends()
		})
	}
}

// Nothing of the request before is told of one that could not be read.
func TestRefusalKnowsNothingOfTheRequestBefore(t *testing.T) {
	seen := make(chan string, 3)
	s := start(t, func(x *Exchange) { reply(x, 200, "") }, func(o *Options) {
		o.Handler.(*funcs).refuse = func(x *Exchange, err *wire.SyntaxError) {
			seen <- x.Request.Method + x.Request.Target + x.Request.Host
			reply(x, err.Status, err.Reason)
		}
	})
	for _, bad := range []string{"\x16\x03", "GET /" + strings.Repeat("x", 9000)} {
		c := s.dial()
		c.send("HEAD /before HTTP/1.1\r\nHost: a\r\n\r\n" + bad)
		c.receiveTo("HEAD")
		a := c.receive()
		require.GreaterOrEqual(t, a.StatusCode, 400)
		require.NotEmpty(t, a.text, "it is no answer to HEAD")
		require.Equal(t, "GET", <-seen)
	}
}

func TestSlowHead(t *testing.T) {
	s := start(t, echo, func(o *Options) { o.HeadTimeout = soon })
	for _, text := range []string{"G", "GET / HTTP/1.1\r\nHost: a\r\n", "\r\n"} {
		c := s.dial()
		c.send(get("/first"))
		require.Equal(t, 200, c.receive().StatusCode)
		c.send(text)
		a := c.receive()
		require.Equal(t, 408, a.StatusCode)
		require.True(t, a.Close)
		c.ends()
	}
	// Each byte does not begin the time anew.
	c := s.dial()
	c.send("GET /")
	for c.silent(soon / 10) {
		c.send("x")
	}
	require.Equal(t, 408, c.receive().StatusCode)
}

func TestSlowBody(t *testing.T) {
	var seen sync.Map
	s := start(t, func(x *Exchange) {
		_, err := io.ReadAll(x)
		seen.Store(x.Request.Target, err)
		if err != nil {
			reply(x, 408, "")
			return
		}
		reply(x, 200, "")
	}, func(o *Options) { o.BodyTimeout = soon })
	deadline := func(target string) {
		t.Helper()
		err, _ := seen.Load(target)
		require.ErrorIs(t, err.(error), os.ErrDeadlineExceeded)
	}

	c := s.dial()
	c.send("POST /pause HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhell")
	a := c.receive()
	require.Equal(t, 408, a.StatusCode)
	require.True(t, a.Close)
	deadline("/pause")
	c.send("o") // too late, and no harm
	c.ends()

	// Bytes that drip make no pause, and less than the least rate.
	c = s.dial()
	c.send("POST /drip HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
	for c.silent(soon / 10) {
		c.send("x")
	}
	require.Equal(t, 408, c.receive().StatusCode)
	deadline("/drip")

	c = s.dial()
	c.send("POST /trailer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-T: v\r\n")
	require.Equal(t, 408, c.receive().StatusCode)
	deadline("/trailer")
}

// The rate is of the whole body: who has sent much may pause for longer in all.
func TestLeastRate(t *testing.T) {
	begun := time.Unix(1000, 0)
	const timeout = 30 * time.Second
	at := func(after time.Duration, received int64) time.Duration {
		return bodyDeadline(begun.Add(after), begun, received, timeout).Sub(begun)
	}
	require.Equal(t, timeout, at(0, 0))
	require.Equal(t, timeout, at(29*time.Second, 1023))
	require.Equal(t, timeout+time.Second, at(29*time.Second, 1024))
	require.Equal(t, 40*time.Second, at(10*time.Second, 1<<20))
	require.Equal(t, timeout+10*time.Second, at(25*time.Second, 10<<10))
}

// A deadline of a body or of a head must not end the connection while it waits
// for the next request, and the other way round.
func TestDeadlinesEndWithWhatTheyBound(t *testing.T) {
	s := start(t, echo, func(o *Options) { o.BodyTimeout, o.HeadTimeout = soon, soon })
	c := s.dial()
	for range 2 {
		c.send("POST / HTTP/1.1\r\n")
		c.send("Host: a\r\nContent-Length: 5\r\n\r\nhe")
		c.send("llo")
		require.Equal(t, "/ hello", c.receive().text)
		require.True(t, c.silent(2*soon), "it is idle, and may be")
	}
}

func TestIdleTimeout(t *testing.T) {
	s := start(t, echo, func(o *Options) { o.IdleTimeout = soon })
	s.dial().ends()
	c := s.dial()
	c.send(get("/"))
	c.receive()
	c.ends()
	require.Eventually(t, func() bool { return s.open() == 0 }, patience, time.Millisecond)
}

func TestClientThatDoesNotReadItsAnswer(t *testing.T) {
	failed := make(chan error, 1)
	s := start(t, func(x *Exchange) {
		x.Head(200, "OK", x.Answer, wire.Chunked)
		part := make([]byte, 64<<10)
		for {
			if err := x.Write(part); err != nil {
				failed <- err
				_ = x.End(nil)
				return
			}
		}
	}, func(o *Options) { o.WriteTimeout = soon })
	c := s.dial()
	c.send(get("/"))
	require.ErrorIs(t, <-failed, os.ErrDeadlineExceeded)
	c.breaks()
}

func TestWriteLimit(t *testing.T) {
	failed := make(chan error, 2)
	s := start(t, func(x *Exchange) {
		x.WriteLimit(time.Now().Add(-time.Second))
		x.Head(200, "OK", x.Answer, 5)
		_ = x.Write([]byte("hello"))
		failed <- x.Flush()
		failed <- x.Write([]byte("!"))
	})
	c := s.dial()
	c.send(get("/"))
	require.ErrorIs(t, <-failed, os.ErrDeadlineExceeded)
	require.ErrorIs(t, <-failed, os.ErrDeadlineExceeded, "an error stays")
	require.Empty(t, c.breaks())
}

func TestHandlersThatDoNotKeepTheirWord(t *testing.T) {
	var after error
	s := start(t, func(x *Exchange) {
		length := int64(5)
		switch x.Request.Target {
		case "/nothing":
			return
		case "/end alone", "/end%20alone":
			_ = x.End(nil)
			return
		case "/abort":
			x.Abort()
			return
		case "/chunked":
			length = wire.Chunked
		}
		x.Head(200, "OK", x.Answer, length)
		_ = x.Write([]byte("hell"))
		switch x.Request.Target {
		case "/much":
			after = x.Write([]byte("oo"))
			_ = x.Write([]byte("o"))
		case "/abort later", "/chunked", "/cut":
			_ = x.Flush()
			x.Abort()
		case "/no end":
			_ = x.Flush()
			return
		}
		_ = x.End(nil)
	})
	for _, target := range []string{"/nothing", "/end%20alone", "/abort"} {
		c := s.dial()
		c.send(get(target))
		require.Empty(t, c.breaks(), target)
	}
	for _, target := range []string{"/little", "/cut", "/chunked"} {
		c := s.dial()
		c.send(get(target))
		resp, err := c.r.ReadString('\n')
		require.NoError(t, err)
		require.Contains(t, resp, "200")
		rest, err := io.ReadAll(c.r)
		require.NoError(t, err, "what was sent can be read")
		require.Contains(t, string(rest), "hell")
		require.NotContains(t, string(rest), "0\r\n\r\n")
	}
	c := s.dial()
	c.send(get("/much"))
	require.Equal(t, "hello", c.receive().text, "what fits is sent")
	require.ErrorIs(t, after, errTooMuch)
	c.send(get("/much"))
	require.Equal(t, "hello", c.receive().text)
}

func TestPanics(t *testing.T) {
	s := start(t, func(x *Exchange) {
		switch x.Request.Target {
		case "/before":
			panic("before")
		case "/headed":
			x.Head(200, "OK", x.Answer, 5)
			panic("headed")
		case "/flushed":
			x.Head(200, "OK", x.Answer, wire.Chunked)
			_ = x.Write([]byte("hello"))
			_ = x.Flush()
			panic("flushed")
		}
		echo(x)
	}, func(o *Options) {
		o.Handler.(*funcs).refuse = func(*Exchange, *wire.SyntaxError) { panic("refusal") }
	})
	c := s.dial()
	// The client is still sending, and yet learns of it.
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c.Conn, post("/before", strings.Repeat("x", 8<<20)))
		sent <- err
	}()
	a := c.receive()
	require.Equal(t, 500, a.StatusCode)
	require.True(t, a.Close)
	require.NoError(t, <-sent)
	c.ends()

	for _, target := range []string{"/headed", "/flushed"} {
		c = s.dial()
		c.send(get(target))
		require.NotContains(t, c.breaks(), "0\r\n\r\n")
	}
	c = s.dial()
	c.send("bad\r\n\r\n")
	require.Equal(t, 500, c.receive().StatusCode)
	c.ends()
	require.EqualValues(t, 4, s.metric("holdfast_panics_total"))
	require.Contains(t, s.logs.String(), "session_test.go")

	c = s.dial()
	c.send(get("/alive"))
	require.Equal(t, "/alive ", c.receive().text)
}

func TestConnectionLimit(t *testing.T) {
	s := start(t, echo, func(o *Options) { o.Conns = 2 })
	first, second := s.dial(), s.dial()
	for _, c := range []*client{first, second} {
		c.send(get("/"))
		require.Equal(t, 200, c.receive().StatusCode)
	}
	third := s.dial()
	a := third.receive()
	require.Equal(t, 503, a.StatusCode)
	require.True(t, a.Close)
	require.Equal(t, "application/problem+json", a.Header.Get("Content-Type"))
	require.JSONEq(t, `{"title":"Service Unavailable","status":503,"detail":"there are too many connections"}`, a.text)
	require.EqualValues(t, len(a.text), a.ContentLength)
	third.ends()
	require.EqualValues(t, 1, s.metric("holdfast_connections_refused_total"))

	require.NoError(t, first.Close())
	require.Eventually(t, func() bool { return s.open() == 1 }, patience, time.Millisecond)
	c := s.dial()
	c.send(get("/"))
	require.Equal(t, 200, c.receive().StatusCode)
}

func TestConnectionLimitPerClient(t *testing.T) {
	exempt := netip.MustParseAddr("127.0.0.2")
	s := start(t, echo, func(o *Options) {
		o.ConnsPerClient = 1
		o.Exempt = func(a netip.Addr) bool { return a == exempt }
	})
	from := func(ip string) *client {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		c, err := d.Dial("tcp", s.Addr().String())
		require.NoError(t, err)
		return s.client(c)
	}
	serves := func(c *client, status int) {
		t.Helper()
		c.send(get("/"))
		require.Equal(t, status, c.receive().StatusCode)
	}
	serves(from("127.0.0.1"), 200)
	require.Equal(t, 503, from("127.0.0.1").receive().StatusCode)
	serves(from("127.0.0.3"), 200)
	for range 3 {
		serves(from("127.0.0.2"), 200)
	}
}

func TestExchangeTellsTheClient(t *testing.T) {
	seen := make(chan string, 1)
	s := start(t, func(x *Exchange) {
		w, r := x.HTTP()
		require.Nil(t, w)
		require.Nil(t, r)
		seen <- x.Remote.String()
		require.False(t, x.TLS)
		require.Zero(t, x.Remote.Addr().Compare(netip.MustParseAddr("127.0.0.1")))
		reply(x, 200, "")
	})
	c := s.dial()
	c.send(get("/"))
	c.receive()
	require.Equal(t, c.LocalAddr().String(), <-seen)
}

func TestTrailersOfARequest(t *testing.T) {
	s := start(t, func(x *Exchange) {
		_, err := io.ReadAll(x)
		require.NoError(t, err)
		reply(x, 200, x.Trailer().Get("x-t"))
	})
	c := s.dial()
	c.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-T: v\r\n\r\n")
	require.Equal(t, "v", c.receive().text)
	c.send(post("/", "x"))
	require.Empty(t, c.receive().text)
}

func TestWatch(t *testing.T) {
	started, left := make(chan struct{}), make(chan struct{})
	s := start(t, func(x *Exchange) {
		switch x.Request.Target {
		case "/leaves":
			stop := x.Watch(func() { close(left) })
			started <- struct{}{}
			<-left
			stop()
			x.Abort()
		default:
			stop := x.Watch(func() { t.Error("the client is there") })
			started <- struct{}{}
			<-started
			stop()
			reply(x, 200, x.Request.Target)
		}
	}, func(o *Options) { o.IdleTimeout = patience })
	c := s.dial()
	for n := range 3 {
		c.send(get(fmt.Sprintf("/%d", n)))
		<-started
		if n == 1 { // the next request comes while this one is watched
			c.send(get("/next")[:3])
		}
		started <- struct{}{}
		require.Equal(t, fmt.Sprintf("/%d", n), c.receive().text)
		if n == 1 {
			c.send(get("/next")[3:])
			<-started
			started <- struct{}{}
			require.Equal(t, "/next", c.receive().text)
		}
	}
	// With a body that nobody has read nothing is watched.
	c.send("POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
	<-started
	c.send("hello")
	started <- struct{}{}
	require.Equal(t, "/body", c.receive().text)

	c.send(get("/leaves"))
	<-started
	require.NoError(t, c.Close())
	select {
	case <-left:
	case <-time.After(patience):
		t.Fatal("nobody was told")
	}
}

// Sessions and buffers go from connection to connection.
func TestManyConnectionsKeepTheirRequestsApart(t *testing.T) {
	s := start(t, echo)
	for n := range 16 {
		t.Run("", func(t *testing.T) {
			c := s.dial()
			c.t = t
			t.Parallel()
			for m := range 30 {
				body := strings.Repeat(string(rune('a'+n)), 1+m*(n+1)*7)
				target := fmt.Sprintf("/%d/%d", n, m)
				times := 1 + m%2
				sent := make(chan error, 1)
				go func() {
					_, err := io.WriteString(c.Conn, strings.Repeat(post(target, body), times))
					sent <- err
				}()
				for range times {
					require.Equal(t, target+" "+body, c.receive().text)
				}
				require.NoError(t, <-sent)
			}
		})
	}
}

func TestNewRefusesAnAddressInUse(t *testing.T) {
	s := start(t, echo)
	o := s.o
	o.Addr = s.Addr().String()
	_, err := New(o)
	require.ErrorContains(t, err, "listen")
	require.True(t, errors.As(err, new(*net.OpError)))
}

// TestLargeHeadsShareABound: what is above the first buffers is counted, given
// back, and refused when there is no room for it.
func TestLargeHeadsShareABound(t *testing.T) {
	s := start(t, echo)
	large := "GET /a HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 6<<10) + "\r\n"
	c := s.dial()
	c.send(large)
	require.Eventually(t, func() bool { return s.headBytes.Load() > 0 }, patience, time.Millisecond)
	require.Positive(t, s.metric("holdfast_head_bytes"))
	c.send("\r\n")
	require.Equal(t, 200, c.receive().StatusCode)
	require.Eventually(t, func() bool { return s.headBytes.Load() == 0 }, patience, time.Millisecond, "the connection is idle")

	s.headBytes.Store(maxHeadBytes)
	c.send(large + "\r\n")
	require.Equal(t, 503, c.receive().StatusCode)
	s.headBytes.Store(0)
}
