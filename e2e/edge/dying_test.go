package edge_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/edge"
	"github.com/holdfast-io/holdfast/e2e/harness"
)

// act is what an API does with a connection on which a request has begun to
// arrive, of which nothing is read yet. It reports whether the connection is kept.
type act func(nc *net.TCPConn, br *bufio.Reader) (keep bool)

// mortal is an API that counts what arrives, by its first byte, and whose
// connections die as the test says.
type mortal struct {
	l     *net.TCPListener
	all   sync.WaitGroup
	ended chan int // gets the ingress's port for each connection that an act has ended

	mu       sync.Mutex
	next     act
	conns    map[*net.TCPConn]bool
	arrivals []int // of each request the number on its connection, from 1 on
}

func startMortal(t *testing.T) *mortal {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	m := &mortal{l: l.(*net.TCPListener), ended: make(chan int, 1000), next: answerAndKeep, conns: map[*net.TCPConn]bool{}}
	m.all.Go(func() {
		for {
			nc, err := m.l.AcceptTCP()
			if err != nil {
				return
			}
			m.mu.Lock()
			m.conns[nc] = true
			m.mu.Unlock()
			m.all.Go(func() { m.serve(nc) })
		}
	})
	t.Cleanup(func() {
		_ = m.l.Close()
		m.closeAll(false)
		m.all.Wait()
	})
	return m
}

func (m *mortal) url() string { return "http://" + m.l.Addr().String() }

func (m *mortal) serve(nc *net.TCPConn) {
	killed := false
	defer func() {
		_ = nc.Close()
		m.mu.Lock()
		delete(m.conns, nc)
		m.mu.Unlock()
		if killed {
			m.ended <- nc.RemoteAddr().(*net.TCPAddr).Port
		}
	}()
	br := bufio.NewReader(nc)
	for number := 1; br.Buffered() > 0 || arrives(nc); number++ {
		m.mu.Lock()
		m.arrivals = append(m.arrivals, number)
		do := m.next
		m.mu.Unlock()
		if !do(nc, br) {
			killed = true
			return
		}
	}
}

// arrives waits for a byte, and leaves it where it is.
func arrives(nc *net.TCPConn) bool {
	raw, err := nc.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		n, _, err = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return err != syscall.EAGAIN
	})
	return err == nil && n > 0
}

// does sets what is done with requests from now on.
func (m *mortal) does(next act) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next = next
}

// closeAll ends the connections that there are, with a reset if rst.
func (m *mortal) closeAll(rst bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for nc := range m.conns {
		if rst {
			_ = nc.SetLinger(0)
		}
		_ = nc.Close()
	}
}

// awaitEnd waits until the ingress's kernel knows that a connection has ended, of
// which the ingress has the port; with 0, that all have. Until then nobody can
// know that a request is lost which is sent on it, as with every client.
func (m *mortal) awaitEnd(t *testing.T, port int) {
	t.Helper()
	const established = "01"
	api := fmt.Sprintf(":%04X", m.l.Addr().(*net.TCPAddr).Port)
	local := ":"
	if port != 0 {
		local = fmt.Sprintf(":%04X", port)
	}
	require.Eventually(t, func() bool {
		table, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			return false
		}
		for line := range strings.Lines(string(table)) {
			f := strings.Fields(line)
			if strings.Contains(f[1], local) && strings.HasSuffix(f[2], api) && f[3] == established {
				return false
			}
		}
		return true
	}, patience, time.Millisecond)
}

// arrived is what has arrived so far.
func (m *mortal) arrived() []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]int(nil), m.arrivals...)
}

const wholeAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole"

// answerAndKeep reads the request and answers it.
func answerAndKeep(nc *net.TCPConn, br *bufio.Reader) bool {
	return readWhole(br) && says(nc, wholeAnswer)
}

func readWhole(br *bufio.Reader) bool {
	r, err := http.ReadRequest(br)
	if err != nil {
		return false
	}
	_, err = io.Copy(io.Discard, r.Body)
	return err == nil
}

func says(nc *net.TCPConn, text string) bool {
	_, err := io.WriteString(nc, text)
	return err == nil
}

// afterTheBody says a text when it has read the request, and closes.
func afterTheBody(text string) act {
	return func(nc *net.TCPConn, br *bufio.Reader) bool {
		_ = readWhole(br) && says(nc, text)
		return false
	}
}

// death is one way in which a kept-alive connection dies.
type death struct {
	name string
	// idle kills it before the request is sent.
	idle func(*mortal)
	// act kills it afterwards.
	act act
	// captured and uncaptured are the statuses that the client gets; one of
	// 200 with a cut answer is -200.
	captured, uncaptured int
}

var deaths = []death{
	{"idle, by an end", func(m *mortal) { m.closeAll(false) }, answerAndKeep, 200, 200},
	{"idle, by a reset", func(m *mortal) { m.closeAll(true) }, answerAndKeep, 200, 200},
	{"when the request arrives", nil, func(*net.TCPConn, *bufio.Reader) bool { return false }, 502, 502},
	{"after the head", nil, func(_ *net.TCPConn, br *bufio.Reader) bool {
		_, _ = http.ReadRequest(br)
		return false
	}, 502, 502},
	{"in the body", nil, func(_ *net.TCPConn, br *bufio.Reader) bool {
		if r, err := http.ReadRequest(br); err == nil {
			_, _ = io.CopyN(io.Discard, r.Body, bodyBytes/2)
		}
		return false
	}, 502, 502},
	{"after the body, by an end", nil, afterTheBody(""), 502, 502},
	{"after the body, by a reset", nil, func(nc *net.TCPConn, br *bufio.Reader) bool {
		_ = readWhole(br) && nc.SetLinger(0) == nil
		return false
	}, 502, 502},
	{"in the status line", nil, afterTheBody("HTTP/1.1 20"), 502, 502},
	{"after an interim answer", nil, afterTheBody("HTTP/1.1 103 Early Hints\r\n\r\n"), 502, 502},
	{"in the head of the answer", nil, afterTheBody("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"), 502, 502},
	{"in a short answer", nil, afterTheBody("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwh"), 502, -200},
	{"in an answer in chunks", nil, afterTheBody("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwh"), -200, -200},
	{"between chunks", nil, afterTheBody("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nwh\r\n"), -200, -200},
	{"in a long answer", nil, afterTheBody("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 50_000)), -200, -200},
	{"after the answer, unannounced", nil, afterTheBody(wholeAnswer), 200, 200},
}

// bodyBytes is the least size of a body.
const bodyBytes = 1000

// bodies are the ways in which a request has one. What is above the inline limit
// is captured while it passes.
var bodies = []struct {
	name string
	head string
	body string
}{
	{"short", fmt.Sprintf("Content-Length: %d\r\n", bodyBytes), strings.Repeat("s", bodyBytes)},
	{"long", "Content-Length: 600000\r\n", strings.Repeat("l", 600_000)},
	{"short in chunks", "Transfer-Encoding: chunked\r\n", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", bodyBytes, strings.Repeat("c", bodyBytes))},
	{"long in chunks", "Transfer-Encoding: chunked\r\n", strings.Repeat(fmt.Sprintf("%x\r\n%s\r\n", 60_000, strings.Repeat("d", 60_000)), 10) + "0\r\n\r\n"},
}

// once sends a request on a connection of its own and reads the answer, which may
// be cut short.
func once(t *testing.T, addr, method, head, body string) (a edge.Answer, cut bool) {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	defer nc.Close()
	require.NoError(t, nc.SetDeadline(time.Now().Add(patience)))
	_, err = fmt.Fprintf(nc, "%s / HTTP/1.1\r\nHost: %s\r\nIdempotency-Key: \"k\"\r\n%s\r\n%s", method, addr, head, body)
	require.NoError(t, err)
	br := bufio.NewReader(nc)
	for a.Status < 200 {
		a, err = edge.ReadAnswer(br, method)
		if a.Status == 0 {
			require.NoError(t, err)
		}
	}
	return a, err != nil
}

// TestUpstreamDies lets the kept-alive connection to the API die at each stage of
// a request, of methods that libraries repeat and others, with a key that makes
// them repeat those too. Nothing arrives twice; what the client is told, and what
// is recorded, follows from where it died.
func TestUpstreamDies(t *testing.T) {
	t.Parallel()
	for _, capturing := range []bool{true, false} {
		t.Run(map[bool]string{true: "captured", false: "uncaptured"}[capturing], func(t *testing.T) {
			t.Parallel()
			api := startMortal(t)
			methods := map[bool]string{true: "*", false: "NONE"}[capturing]
			s := startSystem(t, api.url(), "CAPTURE_METHODS="+methods, "INLINE_BYTES=16KiB")
			addr := ingressAddr(s)
			states := map[string]string{} // by id
			total := 0
			send := func(t *testing.T, method, head, body string, want int) {
				t.Helper()
				a, cut := once(t, addr, method, head, body)
				require.Equal(t, max(want, -want), a.Status, "%s %s", a.Start, a.Body)
				require.Equal(t, want < 0, cut, "%q", a.Raw)
				if want == 502 {
					require.Equal(t, []string{"application/problem+json"}, a.Fields.Values("Content-Type"))
				}
				stored := a.Fields.Values("X-Request-Stored")
				if !capturing {
					require.Empty(t, stored)
					return
				}
				require.Equal(t, []string{"synced"}, stored)
				states[id(t, a)] = map[bool]string{true: "processed", false: "failed"}[want == 200]
			}
			for _, d := range deaths {
				for _, method := range []string{"GET", "PUT", "POST", "DELETE"} {
					for _, b := range bodies {
						head, body := b.head, b.body
						if method == "GET" {
							if b.name != bodies[0].name || d.name == "in the body" {
								continue
							}
							head, body = "", ""
						}
						t.Run(d.name+"/"+method+" "+b.name, func(t *testing.T) {
							want := d.uncaptured
							if capturing {
								want = d.captured
							}
							kept := false
							for try := 0; !kept; try++ {
								require.Less(t, try, 100, "no connection is kept alive")
								before := len(api.arrived())
								api.does(answerAndKeep)
								send(t, "GET", "", "", 200)
								if d.idle != nil {
									d.idle(api)
									api.awaitEnd(t, 0)
								}
								api.does(d.act)
								send(t, method, head, body, want)
								if d.idle == nil {
									api.awaitEnd(t, receive(t, api.ended))
								}
								arrived := api.arrived()[before:]
								require.Len(t, arrived, 2, "what was sent once arrives once")
								total += 2
								// The gateway gives its connection back after the answer: the
								// next request may have come before that.
								kept = arrived[1] > 1 || d.idle != nil
							}
						})
					}
				}
			}
			require.Len(t, api.arrived(), total, "nothing came later")
			if !capturing {
				return
			}
			var all []harness.Request
			require.Eventually(t, func() bool {
				var err error
				all, err = s.Requests(t.Context(), "")
				return err == nil && len(all) == len(states) && settled(all)
			}, patience, 50*time.Millisecond)
			for _, r := range all {
				require.Equal(t, states[r.ID], r.State, "%+v", r)
				require.Equal(t, 1, r.Attempts, "%+v", r)
			}
		})
	}
}

// settled reports whether each request has its outcome.
func settled(all []harness.Request) bool {
	for _, r := range all {
		if r.State == "received" {
			return false
		}
	}
	return true
}

// swallower stands between ingress and API. What it holds it can make half open:
// either side may send, and hears nothing.
type swallower struct {
	l   net.Listener
	api string
	all sync.WaitGroup

	mu    sync.Mutex
	mute  map[net.Conn]bool // by the ingress's side; true once it is half open
	other map[net.Conn]net.Conn
}

func startSwallower(t *testing.T, api string) *swallower {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &swallower{l: l, api: api, mute: map[net.Conn]bool{}, other: map[net.Conn]net.Conn{}}
	s.all.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			back, err := net.Dial("tcp", api)
			if err != nil {
				_ = nc.Close()
				continue
			}
			s.mu.Lock()
			s.mute[nc], s.other[nc] = false, back
			s.mu.Unlock()
			s.all.Go(func() { s.carry(nc, nc, back) })
			s.all.Go(func() { s.carry(nc, back, nc) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		s.mu.Lock()
		for nc, back := range s.other {
			_ = nc.Close()
			_ = back.Close()
		}
		s.mu.Unlock()
		s.all.Wait()
	})
	return s
}

func (s *swallower) carry(pair, from, to net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		s.mu.Lock()
		mute := s.mute[pair]
		s.mu.Unlock()
		if err != nil {
			if !mute {
				_ = to.Close()
			}
			return
		}
		if !mute {
			_, _ = to.Write(buf[:n])
		}
	}
}

// swallow makes all connections that there are half open.
func (s *swallower) swallow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for nc := range s.mute {
		s.mute[nc] = true
	}
}

// swallowed is how many there are.
func (s *swallower) swallowed() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, mute := range s.mute {
		if mute {
			n++
		}
	}
	return n
}

// TestUpstreamVanishes makes kept-alive connections half open: nobody hears what is
// sent on them, and nothing says so. Each costs at most one request, which ends
// with its timeout, is not sent on another connection, and can be replayed.
func TestUpstreamVanishes(t *testing.T) {
	t.Parallel()
	for _, capturing := range []bool{true, false} {
		t.Run(map[bool]string{true: "captured", false: "uncaptured"}[capturing], func(t *testing.T) {
			t.Parallel()
			api := startMortal(t)
			between := startSwallower(t, api.l.Addr().String())
			methods := map[bool]string{true: "*", false: "NONE"}[capturing]
			s := startSystem(t, "http://"+between.l.Addr().String(), "CAPTURE_METHODS="+methods, "INLINE_BYTES=16KiB", "UPSTREAM_TIMEOUT=1s")
			lost := map[string]bool{}
			arrived := 0
			// send reports whether the request arrived. It did if and only if it was
			// answered.
			send := func(method, head, body string) bool {
				a, cut := once(t, ingressAddr(s), method, head, body)
				require.False(t, cut)
				if a.Status == 200 {
					arrived++
				} else {
					require.Equal(t, 504, a.Status, "%s", a.Body)
					lost[id(t, a)] = true
				}
				require.Len(t, api.arrived(), arrived)
				return a.Status == 200
			}
			reach := func() {
				for !send("GET", "", "") {
					require.LessOrEqual(t, len(lost), between.swallowed())
				}
			}
			for _, c := range []struct {
				method string
				body   int
			}{{"PUT", 0}, {"POST", 1}} {
				// The gateway may open a new connection where it has not got the old one
				// back yet.
				for try := true; try; try = send(c.method, bodies[c.body].head, bodies[c.body].body) {
					reach()
					between.swallow()
				}
				reach()
			}
			if !capturing {
				return
			}
			require.Eventually(t, func() bool {
				all, err := s.Requests(t.Context(), "state=failed")
				if err != nil || len(all) != len(lost) {
					return false
				}
				for _, r := range all {
					if !lost[r.ID] || r.Attempts != 1 {
						return false
					}
				}
				return true
			}, patience, 50*time.Millisecond)
		})
	}
}
