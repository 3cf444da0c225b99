package edge

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The ways in which a client can be a burden.
const (
	Loris    = "a byte of a head each 100 ms"
	Trickler = "a byte of a body each 100 ms"
	Deaf     = "reads nothing of a large answer"
	Silent   = "sends nothing, half open"
)

// Burdens are all of them.
var Burdens = []string{Loris, Trickler, Deaf, Silent}

// Large is the target of the request whose answer Deaf does not read. The API
// must answer it with more than sockets hold: LargeBytes.
const (
	Large      = "/large"
	LargeBytes = 16 << 20
)

// announced is the length of the body that Trickler announces.
const announced = 200 << 10

// pace is that of slow clients.
const pace = 100 * time.Millisecond

// Burden connects to addr and is a burden until the other side ends the
// connection, or ctx is done, which is an error. It gives the time that the
// connection lasted.
func Burden(ctx context.Context, kind, addr string) (time.Duration, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if kind == Deaf {
			err = c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<10) })
		}
		return err
	}}
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return 0, fmt.Errorf("connect: %w", err)
	}
	defer nc.Close()
	began := time.Now()
	defer context.AfterFunc(ctx, func() { _ = nc.Close() })()
	head := "Host: " + addr + "\r\n"
	switch kind {
	case Loris:
		err = trickle(nc, "GET / HTTP/1.1\r\n"+head+"X-Long: ")
	case Trickler:
		if _, err = fmt.Fprintf(nc, "POST / HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n", head, announced); err == nil {
			err = trickle(nc, "")
		}
	case Deaf:
		if _, err = fmt.Fprintf(nc, "GET %s HTTP/1.1\r\n%s\r\n", Large, head); err == nil {
			err = awaitReset(nc)
		}
	case Silent:
		_, err = nc.Read(make([]byte, 1))
	default:
		return 0, fmt.Errorf("no such burden: %s", kind)
	}
	lasted := time.Since(began)
	switch {
	case ctx.Err() != nil:
		return lasted, fmt.Errorf("%s: still connected: %w", kind, ctx.Err())
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return lasted, nil
	}
	return lasted, fmt.Errorf("%s: %w", kind, err)
}

// trickle sends the text, and then for ever, a byte at a time, until the other
// side ends the connection.
func trickle(nc net.Conn, text string) error {
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, nc) // an answer may come first
		ended <- err
	}()
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for i := 0; ; i++ {
		next := "x"
		if i < len(text) {
			next = text[i : i+1]
		}
		if _, err := io.WriteString(nc, next); err != nil {
			_ = nc.Close()
			<-ended
			return err
		}
		select {
		case err := <-ended:
			return err
		case <-tick.C:
		}
	}
}

// awaitReset waits for the reset of a connection that has bytes to read, without
// reading them.
func awaitReset(nc net.Conn) error {
	raw, err := nc.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	const closed = 7 // TCP_CLOSE (linux/tcp_states.h)
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		var info *unix.TCPInfo
		var ierr error
		if err := raw.Control(func(fd uintptr) { info, ierr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); err != nil {
			return err
		}
		if ierr != nil || info.State == closed {
			return ierr
		}
		<-tick.C
	}
}

// EnoughFiles says how the limit of open files falls short of so many
// connections for one process. Those that it starts have the same limit.
func EnoughFiles(connections int) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	const others = 500 // files, listeners, connections between the parts
	if need := uint64(connections + others); limit.Cur < need {
		return fmt.Errorf("%d connections need %d open files, and the limit is %d: raise it (ulimit -n %d)", connections, need, limit.Cur, need)
	}
	return nil
}

// Idle opens n connections, each of which has done a request when it returns, and
// is idle then. They are HTTP/1.1 over TLS with a config. Several addresses of the
// loopback network are their sources, so that ports do not run out. The caller
// closes them, after an error too.
func Idle(ctx context.Context, addr string, n int, config *tls.Config) ([]net.Conn, error) {
	const sources, dialers = 8, 32
	var mu sync.Mutex
	var conns []net.Conn
	var errs []error
	var wg sync.WaitGroup
	for i := range dialers {
		wg.Go(func() {
			for j := i; j < n; j += dialers {
				nc, err := idle(ctx, addr, net.IPv4(127, 0, 0, byte(1+j%sources)), config)
				mu.Lock()
				if err != nil {
					errs = append(errs, err)
				} else {
					conns = append(conns, nc)
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return conns, errors.Join(errs...)
}

func idle(ctx context.Context, addr string, source net.IP, config *tls.Config) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: source}}
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	if config != nil {
		nc = tls.Client(nc, config)
	}
	defer context.AfterFunc(ctx, func() { _ = nc.Close() })()
	body := strings.Repeat("i", 100)
	if _, err = fmt.Fprintf(nc, "POST / HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", addr, len(body), body); err == nil {
		var a Answer
		if a, err = ReadAnswer(bufio.NewReaderSize(nc, 512), "POST"); err == nil && a.Status != 200 {
			err = fmt.Errorf("answered %s", a.Start)
		}
	}
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("do a request before being idle: %w", err)
	}
	return nc, nil
}
