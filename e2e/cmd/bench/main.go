// Command bench compares Holdfast with nginx's proxy_pass, side by side in one
// run: a load of 1 KiB POSTs over 64 kept-alive connections goes to each stack
// in turn, several rounds. It prints medians, and ratios to nginx.
//
// All processes share the machine with the load generator and the API. The CPU
// of a stack is that of all its processes, from the first request until
// everything it took is recorded; load generator and API are not counted.
//
// With -bodies, -idle, -slow or -recovery it looks instead at what large bodies,
// idle connections, slow clients or the replay of a large ledger cost. Each ends
// by itself.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

func main() {
	var b bench
	flag.StringVar(&b.bin, "bin", "bin", "directory of the binaries")
	flag.StringVar(&b.natsServer, "nats-server", ".tools/nats-server", "path of nats-server")
	flag.StringVar(&b.script, "script", "e2e/bench/post.lua", "script for wrk")
	flag.IntVar(&b.rounds, "rounds", 3, "rounds")
	flag.DurationVar(&b.duration, "duration", 8*time.Second, "load of one stack in one round")
	flag.IntVar(&b.connections, "connections", 64, "connections of the load")
	only := flag.String("only", "", "run this stack alone")
	bodies := flag.Int64("bodies", 0, "instead, send so many MiB of large bodies through standalone and look at its memory")
	idle := flag.Int("idle", 0, "instead, keep so many idle connections on an ingress, and a tenth as many over TLS, and look at what they cost")
	slow := flag.Int("slow", 0, "instead, have so many clients of each slow kind at an ingress, and look at what they cost")
	recovery := flag.Int("recovery", 0, "instead, fill a ledger with so many requests, and replay them through crashes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := b.run(ctx, *only, *bodies<<20, *idle, *slow, *recovery); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

type bench struct {
	bin, natsServer, script string
	rounds, connections     int
	duration                time.Duration
	dir                     string
	api                     string
}

// stack is what is compared: start gives its URL, its processes, and a
// function that waits until everything it took is recorded.
type stack struct {
	name  string
	start func(ctx context.Context, dir string) (running, error)
}

type running struct {
	url   string
	pids  func() []int
	drain func(ctx context.Context) error
	stop  func()
}

// figures are those of one round.
type figures struct {
	RequestsPerSecond, P50, P99, CPU, PeakRSS float64 // 1/s, ms, ms, µs per request, MiB
	Errors                                    int
}

func (b *bench) run(ctx context.Context, only string, bodies int64, idle, slow, recovery int) (err error) {
	if b.dir, err = os.MkdirTemp("", "bench-"); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer os.RemoveAll(b.dir)
	for _, p := range []*string{&b.bin, &b.natsServer, &b.script} {
		if *p, err = filepath.Abs(*p); err != nil {
			return fmt.Errorf("resolve a path: %w", err)
		}
	}
	switch {
	case bodies > 0:
		return b.bodies(ctx, bodies)
	case idle > 0:
		return b.idle(ctx, idle)
	case slow > 0:
		return b.slow(ctx, slow)
	case recovery > 0:
		return b.recovery(ctx, recovery)
	}
	api, err := b.startNginx(ctx, "api", "location / { return 200 ok; }", "")
	if err != nil {
		return err
	}
	defer api.stop()
	b.api = api.url

	stacks := []stack{{"nginx proxy_pass", b.nginx}, {"ingress, held until fsync", b.ingress}, {"standalone, everything", b.standalone}}
	results := make([][]figures, len(stacks))
	for round := range b.rounds {
		for i, s := range stacks {
			if only != "" && !strings.HasPrefix(s.name, only) {
				continue
			}
			f, err := b.measure(ctx, s, filepath.Join(b.dir, fmt.Sprintf("%d-%d", round, i)))
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			fmt.Fprintf(os.Stderr, "round %d  %-26s %7.0f requests/s  p50 %6.2f ms  p99 %7.2f ms  %6.1f µs CPU  %4.0f MiB  %d errors\n",
				round+1, s.name, f.RequestsPerSecond, f.P50, f.P99, f.CPU, f.PeakRSS, f.Errors)
			results[i] = append(results[i], f)
		}
	}
	if only == "" {
		report(stacks, results)
	}
	return nil
}

func (b *bench) measure(ctx context.Context, s stack, dir string) (figures, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return figures{}, fmt.Errorf("make a directory: %w", err)
	}
	r, err := s.start(ctx, dir)
	if err != nil {
		return figures{}, err
	}
	defer os.RemoveAll(dir)
	defer r.stop()
	if _, err := b.load(ctx, r.url, time.Second); err != nil { // connections, caches, first segments
		return figures{}, err
	}
	if err := r.drain(ctx); err != nil {
		return figures{}, err
	}
	before := cpu(r.pids())
	f, err := b.load(ctx, r.url, b.duration)
	if err != nil {
		return figures{}, err
	}
	if err := r.drain(ctx); err != nil {
		return figures{}, err
	}
	f.CPU = (cpu(r.pids()) - before).Seconds() * 1e6 / (f.RequestsPerSecond * b.duration.Seconds())
	f.PeakRSS = peakRSS(r.pids())
	return f, nil
}

func (b *bench) load(ctx context.Context, url string, d time.Duration) (figures, error) {
	cmd := exec.CommandContext(ctx, "wrk", "-t1", "-c"+strconv.Itoa(b.connections), "-d"+strconv.Itoa(int(d.Seconds()))+"s", "-s", b.script, url+"/v1/calls")
	out, err := cmd.CombinedOutput()
	_, line, ok := strings.Cut(string(out), "BENCH ")
	if err != nil || !ok {
		return figures{}, fmt.Errorf("wrk: %w\n%s", err, out)
	}
	var w struct {
		Requests   float64 `json:"requests"`
		DurationUS float64 `json:"duration_us"`
		P50US      float64 `json:"p50_us"`
		P99US      float64 `json:"p99_us"`
		Errors     int     `json:"errors"`
	}
	line, _, _ = strings.Cut(line, "\n")
	if err := json.Unmarshal([]byte(line), &w); err != nil {
		return figures{}, fmt.Errorf("wrk: %w", err)
	}
	return figures{
		RequestsPerSecond: w.Requests / w.DurationUS * 1e6, P50: w.P50US / 1e3, P99: w.P99US / 1e3, Errors: w.Errors,
	}, nil
}

// nginx forwards to the API with kept-alive connections, and logs nothing.
func (b *bench) nginx(ctx context.Context, dir string) (running, error) {
	return b.startNginx(ctx, filepath.Base(dir),
		`location / { proxy_pass http://api; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host; }`,
		"upstream api { server "+strings.TrimPrefix(b.api, "http://")+"; keepalive 128; }")
}

func (b *bench) startNginx(ctx context.Context, name, location, upstream string) (running, error) {
	addr, err := proc.FreeAddr()
	if err != nil {
		return running{}, err
	}
	dir := filepath.Join(b.dir, "nginx-"+name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return running{}, fmt.Errorf("make a directory: %w", err)
	}
	conf := fmt.Sprintf(`worker_processes 2; daemon off; pid %[1]s/pid; error_log %[1]s/error.log crit;
events { worker_connections 4096; }
http {
  access_log off; keepalive_requests 1000000000; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s; client_body_buffer_size 64k;
  %[4]s
  server { listen %[2]s; location = /healthy { return 200; } %[3]s }
}`, dir, addr, location, upstream)
	path := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
		return running{}, fmt.Errorf("configure nginx: %w", err)
	}
	bin, err := exec.LookPath("nginx")
	if err != nil {
		bin = "/usr/sbin/nginx"
	}
	p, err := proc.Start(proc.Spec{Name: "nginx-" + name, Path: bin, Args: []string{"-c", path, "-p", dir}, Dir: b.dir})
	if err != nil {
		return running{}, err
	}
	// Its workers are not our children: the master has to end them itself.
	r := running{
		url:   "http://" + addr,
		pids:  func() []int { return append(children(p.Pid()), p.Pid()) },
		drain: func(context.Context) error { return nil },
		stop:  func() { _, _ = p.Stop(10 * time.Second) },
	}
	ready, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := proc.AwaitHTTP(ready, p, r.url+"/healthy"); err != nil {
		r.stop()
		return running{}, err
	}
	return r, nil
}

// ingress is the ingress and its broker: what a client waits for. Nobody
// records, so its spool keeps everything.
func (b *bench) ingress(ctx context.Context, dir string) (running, error) {
	return b.holdfast(ctx, dir, harness.Distributed, []string{harness.NATS, harness.Ingress}, false)
}

// standalone is everything in one process.
func (b *bench) standalone(ctx context.Context, dir string) (running, error) {
	return b.holdfast(ctx, dir, harness.Standalone, nil, true)
}

func (b *bench) holdfast(ctx context.Context, dir string, topology harness.Topology, roles []string, drains bool) (running, error) {
	s, err := harness.New(harness.Options{
		Topology: topology, Bin: b.bin, NATSServer: b.natsServer, Dir: dir, Upstream: b.api,
		Settings: map[string]string{"STREAM_MAX_BYTES": "8GiB", "SPOOL_MAX_BYTES": "4GiB", "ACCESS_LOG": "off"},
	})
	if err != nil {
		return running{}, err
	}
	if err := s.Start(ctx, roles...); err != nil {
		s.Close()
		return running{}, err
	}
	if len(roles) == 0 {
		roles = s.Processes()
	}
	r := running{
		url: s.IngressURL(),
		pids: func() (pids []int) {
			for _, role := range roles {
				pids = append(pids, s.Process(role).Pid())
			}
			return pids
		},
		drain: func(context.Context) error { return nil },
		stop:  s.Close,
	}
	if drains {
		r.drain = func(ctx context.Context) error { return drained(ctx, s) }
	}
	return r, nil
}

// drained waits until the spool holds nothing that is not recorded.
func drained(ctx context.Context, s *harness.System) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		v, err := s.Metric(ctx, harness.Ingress, "holdfast_spool_unreleased")
		if err != nil {
			return err
		}
		if v == 0 {
			return nil
		}
		timer := time.NewTimer(20 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("wait for the spool to drain: %w", ctx.Err())
		}
	}
}

// cpu is the time that the processes have used, user and system
// (proc_pid_stat(5), fields 14 and 15).
func cpu(pids []int) time.Duration {
	const ticks = 100 // sysconf(_SC_CLK_TCK) on every Linux
	var total time.Duration
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		fields := strings.Fields(rest)
		user, err1 := strconv.Atoi(fields[11])
		system, err2 := strconv.Atoi(fields[12])
		if errors.Join(err1, err2) == nil {
			total += time.Duration(user+system) * time.Second / ticks
		}
	}
	return total
}

// peakRSS is the sum of the largest resident sets, in MiB.
func peakRSS(pids []int) float64 {
	total := 0
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(b), "VmHWM:")
		if fields := strings.Fields(rest); len(fields) > 0 {
			kb, _ := strconv.Atoi(fields[0])
			total += kb
		}
	}
	return float64(total) / 1024
}

func children(pid int) (pids []int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	for field := range strings.FieldsSeq(string(b)) {
		if child, err := strconv.Atoi(field); err == nil {
			pids = append(pids, child)
		}
	}
	return pids
}

func report(stacks []stack, results [][]figures) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "median of rounds\trequests/s\t(nginx)\tp50 ms\t(nginx)\tp99 ms\t(nginx)\tCPU µs/request\t(nginx)\tpeak MiB\terrors\t")
	median := func(i int, of func(figures) float64) float64 {
		var values []float64
		for _, f := range results[i] {
			values = append(values, of(f))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	for i, s := range stacks {
		fmt.Fprintf(w, "%s\t", s.name)
		for j, of := range []func(figures) float64{
			func(f figures) float64 { return f.RequestsPerSecond },
			func(f figures) float64 { return f.P50 },
			func(f figures) float64 { return f.P99 },
			func(f figures) float64 { return f.CPU },
		} {
			format := "%.2f\t%.2f\t"
			if j == 0 {
				format = "%.0f\t%.2f\t"
			}
			fmt.Fprintf(w, format, median(i, of), median(i, of)/median(0, of))
		}
		errs := 0
		for _, f := range results[i] {
			errs += f.Errors
		}
		fmt.Fprintf(w, "%.0f\t%d\t\n", median(i, func(f figures) float64 { return f.PeakRSS }), errs)
	}
	_ = w.Flush() // standard output is all there is to report to
}
