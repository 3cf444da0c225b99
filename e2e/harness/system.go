// Package harness runs Holdfast as its users do, as real processes, and lets
// scenarios break it.
//
// A scenario is written once and run over two topologies: Standalone is one
// process with everything in it; Distributed is each service in a process of
// its own, with a real nats-server.
package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-io/holdfast/e2e/proc"
)

// Topology says which processes there are.
type Topology string

// The topologies.
const (
	Standalone  Topology = "standalone"
	Distributed Topology = "distributed"
)

// Roles. In a Standalone topology all of them are played by one process.
const (
	NATS     = "nats"
	Recorder = "recorder"
	Acker    = "acker"
	Ingress  = "ingress"
)

const (
	// startWait and stopWait bound starts and stops on a busy machine.
	startWait = 60 * time.Second
	stopWait  = 40 * time.Second
)

// Options say what to run.
type Options struct {
	Topology Topology
	// Bin is the directory with the binaries; NATSServer the path of
	// nats-server, for Distributed.
	Bin, NATSServer string
	// Dir is where everything is kept.
	Dir string
	// Upstream is the URL of the API.
	Upstream string
	// Settings are further settings, without their prefix, for all services.
	Settings map[string]string
}

// System is a deployment of Holdfast. It is not safe for concurrent use, but
// for its URLs.
type System struct {
	o         Options
	processes map[string]*proc.Process
	addrs     map[string]string
	natsArgs  []string
}

// New chooses addresses and makes directories. It starts nothing.
func New(o Options) (*System, error) {
	s := &System{o: o, processes: map[string]*proc.Process{}, addrs: map[string]string{}}
	for _, name := range []string{"ingress", "acker", "recorder", "nats", "ops-ingress", "ops-acker", "ops-recorder", "ops-standalone"} {
		addr, err := proc.FreeAddr()
		if err != nil {
			return nil, err
		}
		s.addrs[name] = addr
	}
	for _, dir := range []string{o.Dir, s.DataDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make a directory: %w", err)
		}
	}
	return s, nil
}

// URLs of the parts.
func (s *System) IngressURL() string  { return "http://" + s.addrs["ingress"] }
func (s *System) AckerURL() string    { return "http://" + s.addrs["acker"] }
func (s *System) RecorderURL() string { return "http://" + s.addrs["recorder"] }
func (s *System) NATSURL() string     { return "nats://" + s.addrs["nats"] }

// OpsURL is the ops listener of the process that plays the role.
func (s *System) OpsURL(role string) string { return "http://" + s.addrs["ops-"+s.process(role)] }

// Directories and files.
func (s *System) DataDir() string  { return filepath.Join(s.o.Dir, "data") }
func (s *System) SpoolDir() string { return filepath.Join(s.DataDir(), "spool") }
func (s *System) Ledger() string   { return filepath.Join(s.DataDir(), "ledger.db") }

// NATSDir is where the streams are kept.
func (s *System) NATSDir() string { return filepath.Join(s.DataDir(), "nats") }

// Topology is the one it was made with.
func (s *System) Topology() Topology { return s.o.Topology }

// process is the name of the process that plays a role.
func (s *System) process(role string) string {
	if s.o.Topology == Standalone {
		return "standalone"
	}
	return role
}

// Processes are the names of all processes, in the order of their start.
func (s *System) Processes() []string {
	if s.o.Topology == Standalone {
		return []string{"standalone"}
	}
	return []string{NATS, Recorder, Acker, Ingress}
}

// Process gives the process that plays the role, nil when it never started.
func (s *System) Process(role string) *proc.Process { return s.processes[s.process(role)] }

// Set changes a setting for processes that start from now on; an empty value
// removes it.
func (s *System) Set(name, value string) {
	s.o.Settings = maps.Clone(s.o.Settings)
	if s.o.Settings == nil {
		s.o.Settings = map[string]string{}
	}
	s.o.Settings[name] = value
}

// NATSArgs are further arguments of nats-server, from its next start on.
func (s *System) NATSArgs(args ...string) { s.natsArgs = args }

// Env is the environment of a process.
func (s *System) Env(name string) []string {
	settings := map[string]string{
		"DATA_DIR":      s.DataDir(),
		"LEDGER_URL":    "sqlite://" + s.Ledger(),
		"UPSTREAM_URL":  s.o.Upstream,
		"INGRESS_ID":    "ingress-1",
		"INGRESS_ADDR":  s.addrs["ingress"],
		"ACKER_ADDR":    s.addrs["acker"],
		"RECORDER_ADDR": s.addrs["recorder"],
		"NATS_URL":      s.NATSURL(),
		"NATS_ADDR":     s.addrs["nats"],
		"SPOOL_DIR":     s.SpoolDir(),
		"OPS_ADDR":      s.addrs["ops-"+name],
		"LOG_FORMAT":    "json",
		"LOG_LEVEL":     "info",
		// The defaults reserve more disk than a test has any use for.
		"STREAM_MAX_BYTES": "1GiB",
		"SPOOL_MAX_BYTES":  "512MiB",
	}
	maps.Copy(settings, s.o.Settings)
	var env []string
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		env = append(env, "HOLDFAST_"+name+"="+settings[name])
	}
	return env
}

// Start starts the processes that play the roles, all of them without an
// argument, and waits until they are ready. Those that run are left alone.
func (s *System) Start(ctx context.Context, roles ...string) error {
	if len(roles) == 0 {
		roles = s.Processes()
	}
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	for _, role := range roles {
		name := s.process(role)
		if p := s.processes[name]; p != nil && p.Running() {
			continue
		}
		if err := s.start(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func (s *System) start(ctx context.Context, name string) error {
	if name == NATS {
		return s.startNATS(ctx)
	}
	p, err := s.Launch(name)
	if err != nil {
		return err
	}
	return proc.AwaitHTTP(ctx, p, "http://"+s.addrs["ops-"+name]+"/readyz")
}

// Launch starts a process without waiting for it.
func (s *System) Launch(role string) (*proc.Process, error) {
	name := s.process(role)
	p, err := proc.Start(proc.Spec{Name: name, Path: filepath.Join(s.o.Bin, name), Env: s.Env(name), Dir: s.o.Dir})
	if err == nil {
		s.processes[name] = p
	}
	return p, err
}

// startNATS starts the real nats-server, and makes the streams on its first
// start.
func (s *System) startNATS(ctx context.Context) error {
	host, port, _ := strings.Cut(s.addrs["nats"], ":")
	monitor := s.addrs["ops-standalone"] // free in this topology
	_, monitorPort, _ := strings.Cut(monitor, ":")
	p, err := proc.Start(proc.Spec{
		Name: NATS, Path: s.o.NATSServer, Dir: s.o.Dir,
		Args: append([]string{"-a", host, "-p", port, "-m", monitorPort, "-js", "-sd", s.NATSDir()}, s.natsArgs...),
	})
	if err != nil {
		return err
	}
	s.processes[NATS] = p
	if err := proc.AwaitHTTP(ctx, p, "http://"+monitor+"/healthz"); err != nil {
		return err
	}
	code, out, err := s.Run(ctx, "recorder", "provision")
	if err != nil || code != 0 {
		return fmt.Errorf("recorder provision: exit code %d: %w\n%s", code, err, out)
	}
	return nil
}

// Kill kills (SIGKILL) the processes that play the roles.
func (s *System) Kill(roles ...string) {
	for _, role := range roles {
		if p := s.Process(role); p != nil {
			p.Kill()
		}
	}
}

// Stop stops (SIGTERM) them in the order given, all in the reverse order of
// their start without an argument, and reports those that failed to.
func (s *System) Stop(roles ...string) error {
	if len(roles) == 0 {
		roles = s.Processes()
		slices.Reverse(roles)
	}
	var errs []error
	for _, role := range roles {
		p := s.Process(role)
		if p == nil || !p.Running() {
			continue
		}
		code, err := p.Stop(stopWait)
		if err == nil && code != 0 && role != NATS {
			err = fmt.Errorf("%s stopped with exit code %d:\n%s", role, code, p.Tail(2<<10))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Run runs one of the binaries to its end with the system's settings, and
// gives its exit code and standard output. Its standard error goes to its log.
func (s *System) Run(ctx context.Context, binary string, args ...string) (code int, stdout string, err error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.o.Bin, binary), args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, s.Env(binary)...)
	cmd.Dir = s.o.Dir
	log, err := os.OpenFile(filepath.Join(s.o.Dir, binary+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return -1, "", fmt.Errorf("run %s: %w", binary, err)
	}
	defer log.Close()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, log
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), out.String(), ctx.Err()
	}
	if err != nil {
		return -1, out.String(), fmt.Errorf("run %s: %w", binary, err)
	}
	return 0, out.String(), nil
}

// Replay runs the replayer.
func (s *System) Replay(ctx context.Context, args ...string) (code int, stdout string, err error) {
	return s.Run(ctx, "replayer", args...)
}

// Request is a request as the read API gives it.
type Request struct {
	ID       string `json:"id"`
	State    string `json:"state"`
	Method   string `json:"method"`
	Target   string `json:"target"`
	Status   int    `json:"status"`
	Attempts int    `json:"attempts"`
}

// Requests lists everything that the query selects, from the read API.
func (s *System) Requests(ctx context.Context, query string) ([]Request, error) {
	var all []Request
	cursor := ""
	for {
		var page struct {
			Requests []Request `json:"requests"`
			Next     string    `json:"next_cursor"`
		}
		url := s.RecorderURL() + "/v1/requests?limit=1000&" + query
		if cursor != "" {
			url += "&cursor=" + cursor
		}
		if err := GetJSON(ctx, url, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Requests...)
		if cursor = page.Next; cursor == "" {
			return all, nil
		}
	}
}

// GetJSON reads a JSON answer with status 200.
func GetJSON(ctx context.Context, url string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("get %s: %w", url, err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("get %s: %w", url, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("get %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("get %s: status %d: %s", url, resp.StatusCode, body)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("get %s: %w", url, err)
	}
	return nil
}

// Close kills whatever still runs.
func (s *System) Close() { s.Kill(s.Processes()...) }

// Metric gives the value of a metric without labels, of the process that plays
// the role.
func (s *System) Metric(ctx context.Context, role, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.OpsURL(role)+"/metrics", nil)
	if err != nil {
		return 0, fmt.Errorf("read metric %s: %w", name, err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("read metric %s: %w", name, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, fmt.Errorf("read metric %s: %w", name, err)
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, fmt.Errorf("read metric %s: it is not there", name)
}
