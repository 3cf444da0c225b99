// Package proc starts, kills and stops the real processes of scenarios, the
// demo and the benchmarks. Whatever it starts dies with the process that
// started it.
package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is one running, or ended, process.
type Process struct {
	Name string
	// Log is the file with its standard output and error.
	Log string

	cmd   *exec.Cmd
	ended chan struct{}
}

// Spec says what to start.
type Spec struct {
	Name string // for logs
	Path string // of the binary
	Args []string
	// Env is the whole environment but for PATH and HOME.
	Env []string
	// Dir is where it runs and where its log goes, as <name>.log, appended.
	Dir string
}

// Start starts the process. It is in a group of its own, so that an interrupt
// at the terminal reaches us alone.
func Start(s Spec) (*Process, error) {
	path := filepath.Join(s.Dir, s.Name+".log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Name, err)
	}
	cmd := exec.Command(s.Path, s.Args...)
	cmd.Dir = s.Dir
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, s.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p := &Process{Name: s.Name, Log: path, cmd: cmd, ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The death signal follows the thread that started the process; the
		// goroutine stays with it by not returning the thread before the end.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // the state tells how it ended
		}
		_ = log.Close()
		close(p.ended)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Name, err)
	}
	return p, nil
}

// Pid is the process's id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Ended is closed when the process has ended.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Running reports whether it has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Signal sends a signal; to an ended process it does nothing.
func (p *Process) Signal(s os.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s: %w", p.Name, err)
	}
	return nil
}

// Kill kills it (SIGKILL) and waits until it is gone.
func (p *Process) Kill() {
	_ = p.Signal(syscall.SIGKILL)
	<-p.ended
}

// Stop asks it to end (SIGTERM), waits for it, and gives its exit code. After
// the time is up it is killed.
func (p *Process) Stop(within time.Duration) (int, error) {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return -1, err
	}
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-p.ended:
		return p.cmd.ProcessState.ExitCode(), nil
	case <-timer.C:
		p.Kill()
		return -1, fmt.Errorf("%s did not stop within %s", p.Name, within)
	}
}

// ExitCode is the exit code of an ended process, -1 when a signal ended it.
func (p *Process) ExitCode() int { return p.cmd.ProcessState.ExitCode() }

// Usage is the CPU time, user and system, and the largest resident set in
// bytes of an ended process.
func (p *Process) Usage() (cpu time.Duration, rss int64) {
	ru, ok := p.cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0, 0
	}
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime(), ru.Maxrss << 10
}

// Tail gives the last bytes of its log.
func (p *Process) Tail(n int64) string {
	f, err := os.Open(p.Log)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	b, _ := io.ReadAll(f)
	return string(b)
}

// FreeAddr gives a loopback address that nobody else uses: until this process
// ends it is not given again, not to another process that asks so either. It is
// below the ports that systems give to outgoing connections (from 32768 on with
// Linux), so that none of those takes it while what listens there is down.
func FreeAddr() (string, error) {
	const lowest, highest = 10_000, 32_000
	var err error
	for range 100 {
		port := lowest + rand.IntN(highest-lowest)
		if err = reserve(port); err == nil {
			return fmt.Sprintf("127.0.0.1:%d", port), nil
		}
	}
	return "", fmt.Errorf("find a free port: %w", err)
}

// reserve binds a socket to the port and keeps it, without listening. Binding
// fails where anybody else has the port. Allowing its reuse afterwards lets those
// bind and listen who allow it too, as Go's listeners do, and not the next
// reserve.
func reserve(port int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err != nil {
		_ = unix.Close(fd)
	}
	return err
}

// AwaitHTTP waits until url answers 200, the process ends, or ctx is done.
func AwaitHTTP(ctx context.Context, p *Process, url string) error {
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		resp, err := client.Get(url)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		timer := time.NewTimer(20 * time.Millisecond)
		select {
		case <-p.ended:
			timer.Stop()
			return fmt.Errorf("%s ended before it was ready:\n%s", p.Name, p.Tail(4<<10))
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%s is not ready: %w\n%s", p.Name, ctx.Err(), p.Tail(4<<10))
		case <-timer.C:
		}
	}
}
