package edge

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Sentinel is the target of requests that are answered and not recorded: a
// client sees by one that its connection is still usable.
const Sentinel = "/sentinel"

// lingers bounds how long a closed connection is read, so that its last answer
// is not lost to a reset. The other side closes as soon as it has seen the end.
const lingers = 2 * time.Second

// Arrival is a request as it reached the API.
type Arrival struct {
	Message
	// Conn counts the API's connections, Number the requests of this one; both
	// begin with 1.
	Conn, Number            int
	Method, Target, Version string
}

// MarshalJSON gives what the API answers: all of it in words.
func (a Arrival) MarshalJSON() ([]byte, error) {
	sum := sha256.Sum256(a.Body)
	return json.Marshal(struct {
		Conn     int    `json:"connection"`
		Number   int    `json:"number"`
		Method   string `json:"method"`
		Target   string `json:"target"`
		Version  string `json:"version"`
		Fields   Fields `json:"fields"`
		Framing  string `json:"framing"`
		Size     int    `json:"size"`
		SHA256   string `json:"sha256"`
		Trailers Fields `json:"trailers"`
	}{a.Conn, a.Number, a.Method, a.Target, a.Version, a.Fields, a.Framing, len(a.Body), hex.EncodeToString(sum[:]), a.Trailers})
}

// Reply is what the API answers instead of a description of the request. The
// zero value is the description.
type Reply struct {
	// Raw is sent as it stands; to HEAD too.
	Raw string
	// Early sends it before the body of the request is read.
	Early bool
	// Close closes the connection afterwards.
	Close bool
}

// API is a server that takes whatever it can make sense of, as careless servers
// do, and remembers every byte. Its methods may be called concurrently.
type API struct {
	l   net.Listener
	all sync.WaitGroup

	mu       sync.Mutex
	accepted int
	conns    map[net.Conn]bool
	reply    Reply
	arrivals []Arrival
	broken   []Arrival
}

// Listen starts an API on a loopback port. It must be closed.
func Listen() (*API, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start the API: %w", err)
	}
	a := &API{l: l, conns: map[net.Conn]bool{}}
	a.all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.mu.Lock()
			a.accepted++
			number := a.accepted
			a.conns[c] = true
			a.mu.Unlock()
			a.all.Go(func() {
				a.serve(c, number)
				_ = c.Close()
				a.mu.Lock()
				delete(a.conns, c)
				a.mu.Unlock()
			})
		}
	})
	return a, nil
}

// Addr is its host and port.
func (a *API) Addr() string { return a.l.Addr().String() }

// URL is where it is.
func (a *API) URL() string { return "http://" + a.Addr() }

// Answer sets the reply to every request from now on.
func (a *API) Answer(r Reply) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reply = r
}

// Take gives the requests that arrived whole since the last time, in the order
// in which they ended, and those that broke off or made no sense; and forgets
// them.
func (a *API) Take() (whole, broken []Arrival) {
	a.mu.Lock()
	defer a.mu.Unlock()
	whole, broken = a.arrivals, a.broken
	a.arrivals, a.broken = nil, nil
	return whole, broken
}

// Drain takes no new connection and waits until all those that there are have
// ended, from the other side: afterwards nothing arrives any more. It reports
// whether they did in time.
func (a *API) Drain(within time.Duration) bool {
	_ = a.l.Close()
	done := make(chan struct{})
	go func() {
		a.all.Wait()
		close(done)
	}()
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// Close ends every connection.
func (a *API) Close() {
	_ = a.l.Close()
	a.mu.Lock()
	for c := range a.conns {
		_ = c.Close()
	}
	a.mu.Unlock()
	a.all.Wait()
}

func (a *API) serve(c net.Conn, number int) {
	br := bufio.NewReader(c)
	for n := 1; ; n++ {
		arrival, reply, err := a.read(c, br)
		arrival.Conn, arrival.Number = number, n
		if err != nil {
			if len(arrival.Raw) > 0 {
				a.mu.Lock()
				a.broken = append(a.broken, arrival)
				a.mu.Unlock()
			}
			if errors.Is(err, errNonsense) {
				_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
				linger(c, br)
			}
			return
		}
		if arrival.Target == Sentinel {
			reply = Reply{Raw: "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsentinel\n"}
		} else {
			a.mu.Lock()
			a.arrivals = append(a.arrivals, arrival)
			a.mu.Unlock()
		}
		if !reply.Early {
			if _, err := io.WriteString(c, reply.text(arrival)); err != nil {
				return
			}
		}
		keeps := arrival.Version != "HTTP/1.0" || arrival.Fields.Has("Connection", "keep-alive")
		if reply.Close || !keeps || arrival.Fields.Has("Connection", "close") {
			linger(c, br)
			return
		}
	}
}

// linger ends the connection in the orderly way.
func linger(c net.Conn, br *bufio.Reader) {
	_ = c.(*net.TCPConn).CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(lingers))
	_, _ = io.Copy(io.Discard, br)
}

func (r Reply) text(a Arrival) string {
	if r.Raw != "" {
		return r.Raw
	}
	body, err := json.Marshal(a)
	if err != nil {
		body = []byte(err.Error()) // strings and numbers do not fail
	}
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nDate: Sun, 01 Jan 2023 00:00:00 GMT\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", len(body))
	if a.Method == "HEAD" {
		return head
	}
	return head + string(body)
}

// errNonsense is reported for what cannot be taken for a request.
var errNonsense = errors.New("not a request")

// read reads one request. Where lengths contradict each other it takes chunked
// coding, or the first of them.
func (a *API) read(c net.Conn, br *bufio.Reader) (r Arrival, reply Reply, err error) {
	t := &tape{br: br}
	defer func() { r.Anomalies, r.Raw = t.anomalies, bytes.Clone(t.raw.Bytes()) }()
	for r.Start == "" {
		if r.Start, err = t.line(); err != nil {
			return r, reply, err
		}
		if r.Start == "" {
			t.odd("an empty line before the request")
		}
	}
	var ok bool
	if r.Method, r.Target, ok = strings.Cut(r.Start, " "); !ok {
		return r, reply, errNonsense
	}
	if i := strings.LastIndexByte(r.Target, ' '); i >= 0 {
		r.Target, r.Version = r.Target[:i], r.Target[i+1:]
	}
	if !isToken(r.Method) || r.Target == "" || strings.ContainsAny(r.Target, " \t#") {
		t.odd("a request line: %.60q", r.Start)
	}
	if len(r.Version) != len("HTTP/1.1") || !strings.HasPrefix(r.Version, "HTTP/1.") {
		t.odd("a version: %.60q", r.Version)
		return r, reply, errNonsense
	}
	if r.Fields, err = t.fields(); err != nil {
		return r, reply, err
	}
	if len(r.Fields.Values("Host")) != 1 {
		t.odd("Host: %.60q", r.Fields.Values("Host"))
	}
	a.mu.Lock()
	reply = a.reply
	a.mu.Unlock()
	if reply.Early {
		if _, err := io.WriteString(c, reply.text(r)); err != nil {
			return r, reply, err
		}
	}
	lengths, codings := r.Fields.Values("Content-Length"), r.Fields.Values("Transfer-Encoding")
	if len(lengths)+len(codings) > 1 {
		t.odd("several lengths: %.60q %.60q", lengths, codings)
	}
	if len(lengths)+len(codings) > 0 && !reply.Early && r.Fields.Has("Expect", "100-continue") {
		if _, err := io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n"); err != nil {
			return r, reply, err
		}
	}
	err = t.message(&r.Message, func() (string, uint64) {
		if strings.Contains(lower(strings.Join(codings, ",")), "chunked") {
			if lower(codings[0]) != "chunked" {
				t.odd("Transfer-Encoding: %.60q", codings)
			}
			return Chunked, 0
		}
		if len(codings) > 0 {
			t.odd("Transfer-Encoding: %.60q", codings)
		}
		if len(lengths) == 0 {
			return None, 0
		}
		n, err := strconv.ParseUint(lengths[0], 10, 63)
		if err != nil {
			t.odd("Content-Length: %.60q", lengths)
		}
		return Length, n
	})
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, net.ErrClosed) {
		err = errors.Join(errNonsense, err)
	}
	return r, reply, err
}
