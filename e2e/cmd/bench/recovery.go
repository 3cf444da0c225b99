package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// Of a recovery.
const (
	recoveryLimit = 10 * time.Minute // for all of it
	killers       = 3
	keys          = 1000 // every second request has one of them
	fillers       = 32   // clients that fill the ledger
	recoveryBody  = 512  // bytes
	poison        = "poison"
	// flatShare and flatMore are what the last quarter of the replayer's memory may
	// be above the first: noise of a heap that is collected now and then.
	flatShare = 1.25
	flatMore  = 16 // MiB
)

// recovery fills a ledger with so many requests while the API is away, and sends
// them when it is back: some of them kill it, the replayer is killed twice, and
// the API restarted once. What became of them is judged by what clients and API
// wrote down.
func (b *bench) recovery(ctx context.Context, total int) error {
	if total < 1000 {
		return errors.New("a recovery of less than 1000 requests shows nothing")
	}
	ctx, cancel := context.WithTimeout(ctx, recoveryLimit)
	defer cancel()
	addr, err := proc.FreeAddr()
	if err != nil {
		return err
	}
	api := exampleapi.NewKeeper(b.bin, b.dir, addr, "-crash-body", poison)
	defer api.Kill()
	s, err := harness.New(harness.Options{
		Topology: harness.Standalone, Bin: b.bin, Dir: filepath.Join(b.dir, "recovery"), Upstream: api.URL(),
		Settings: map[string]string{
			"STREAM_MAX_BYTES": "4GiB", "SPOOL_MAX_BYTES": "4GiB", "ACCESS_LOG": "off", "ORDER_BY": "header:" + exampleapi.HeaderKey,
			// So that what a killed replayer had in flight is soon replayable again.
			"UPSTREAM_TIMEOUT": "5s", "GRACE": "10s",
		},
	})
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.Start(ctx); err != nil {
		return err
	}
	r := recovery{bench: b, s: s, api: api, total: total}
	began := time.Now()
	if err := r.fill(ctx); err != nil {
		return err
	}
	fmt.Printf("%d requests came in while the API was away, at %.0f/s\n", total, float64(total)/time.Since(began).Seconds())
	if err := drained(ctx, s); err != nil {
		return err
	}
	fmt.Printf("all of it was recorded after %.0f s\n", time.Since(began).Seconds())
	if err := api.Start(ctx); err != nil {
		return err
	}
	if err := r.replay(ctx); err != nil {
		return err
	}
	return r.judge(ctx)
}

type recovery struct {
	*bench
	s     *harness.System
	api   *exampleapi.Keeper
	total int

	ids     []uuid.UUID // of all, in any order
	killing []uuid.UUID

	processes []*proc.Process // replayers, by age
	samples   []float64       // of the last one's memory, MiB
	rates     []float64       // arrivals per second, where there were any
	took      time.Duration   // from the start of the first to the end of the last
}

// fill sends all requests to the ingress, which has no API.
func (r *recovery) fill(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r.ids = make([]uuid.UUID, r.total)
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: fillers}}
	defer client.CloseIdleConnections()
	var next atomic.Int64
	var clients sync.WaitGroup
	errs := make(chan error, fillers)
	for range fillers {
		clients.Go(func() {
			for {
				n := int(next.Add(1)) - 1
				if n >= r.total {
					return
				}
				id, err := r.request(ctx, client, n)
				if err != nil {
					errs <- err
					cancel()
					return
				}
				r.ids[n] = id
			}
		})
	}
	clients.Wait()
	close(errs)
	if err := <-errs; err != nil {
		return err
	}
	for k := range killers {
		r.killing = append(r.killing, r.ids[r.place(k)])
	}
	return nil
}

// place is where a killer stands.
func (r *recovery) place(killer int) int { return (2*killer + 1) * r.total / (2 * killers) }

// request sends the nth request. A killer has no key, since it would keep closed
// what is behind it.
func (r *recovery) request(ctx context.Context, client *http.Client, n int) (uuid.UUID, error) {
	body := bytes.Repeat([]byte{'.'}, recoveryBody)
	copy(body, strconv.Itoa(n)+" ")
	kills := false
	for k := range killers {
		kills = kills || n == r.place(k)
	}
	if kills {
		copy(body[recoveryBody/2:], poison)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.s.IngressURL()+"/v1/calls", bytes.NewReader(body))
	if err != nil {
		return uuid.Nil, fmt.Errorf("fill: %w", err)
	}
	if n%2 == 0 && !kills {
		req.Header.Set(exampleapi.HeaderKey, "caller-"+strconv.Itoa(n/2%keys))
	}
	resp, err := client.Do(req)
	if err != nil {
		return uuid.Nil, fmt.Errorf("fill: %w", err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return uuid.Nil, fmt.Errorf("fill: %w", err)
	}
	if stored := resp.Header.Get("X-Request-Stored"); resp.StatusCode != http.StatusBadGateway || stored != "synced" {
		return uuid.Nil, fmt.Errorf("fill: status %d, stored %q", resp.StatusCode, stored)
	}
	id, err := uuid.Parse(resp.Header.Get("X-Request-UUID"))
	if err != nil {
		return uuid.Nil, fmt.Errorf("fill: %w", err)
	}
	return id, nil
}

// replay runs the replayer, and does to it and to the API what happens in the
// worst of nights.
func (r *recovery) replay(ctx context.Context) error {
	began := time.Now()
	defer func() { r.took = time.Since(began) }()
	arrivals := tail{path: exampleapi.ArrivalsFile(r.api.DB())}
	defer arrivals.close()
	if err := r.start(); err != nil {
		return err
	}
	defer func() { r.last().Kill() }()
	kill := func() error {
		fmt.Printf("%5.1fs  %d arrivals: kill -9 the replayer\n", time.Since(began).Seconds(), arrivals.lines)
		r.last().Kill()
		return r.start()
	}
	restart := func() error {
		fmt.Printf("%5.1fs  %d arrivals: restart the API\n", time.Since(began).Seconds(), arrivals.lines)
		r.api.Kill()
		return r.api.Start(ctx)
	}
	// The kills come early, so that the last process has most to do.
	events := []struct {
		at int
		do func() error
	}{{r.total / 10, kill}, {r.total / 5, kill}, {r.total * 3 / 5, restart}}

	const every = 250 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	lines, at := 0, time.Now()
	for {
		var over bool
		select {
		case <-tick.C:
		case <-r.last().Ended():
			over = true
		case <-ctx.Done():
			return fmt.Errorf("the recovery took too long: %w", ctx.Err())
		}
		if err := arrivals.read(); err != nil {
			return err
		}
		if over {
			if len(events) > 0 {
				return fmt.Errorf("the replay ended, with exit code %d, before all was done to it:\n%s", r.last().ExitCode(), r.last().Tail(4<<10))
			}
			return nil
		}
		r.samples = append(r.samples, rss(r.last().Pid()))
		if since := time.Since(at); since >= time.Second {
			if came := arrivals.lines - lines; came > 0 {
				r.rates = append(r.rates, float64(came)/since.Seconds())
			}
			lines, at = arrivals.lines, time.Now()
			fmt.Fprintf(os.Stderr, "%5.1fs  %d arrivals\n", time.Since(began).Seconds(), lines)
		}
		if len(events) > 0 && arrivals.lines >= events[0].at {
			if err := events[0].do(); err != nil {
				return err
			}
			events = events[1:]
		}
	}
}

func (r *recovery) last() *proc.Process { return r.processes[len(r.processes)-1] }

// start starts a replayer, and forgets the samples of the one before.
func (r *recovery) start() error {
	r.samples = nil
	p, err := proc.Start(proc.Spec{
		Name: "replayer", Path: filepath.Join(r.bin, "replayer"), Env: r.s.Env("replayer"), Dir: filepath.Join(r.dir, "recovery"),
		Args: []string{"run", "--wait", "1m", "--concurrency", "32"},
	})
	if err == nil {
		r.processes = append(r.processes, p)
	}
	return err
}

// judge compares what clients, API and ledger have, and says what it cost.
func (r *recovery) judge(ctx context.Context) error {
	path := exampleapi.ArrivalsFile(r.api.DB())
	processed := make(map[string]int, r.total) // id → attempt
	for after := int64(0); ; {
		rows, err := exampleapi.ReadRows(ctx, r.api.DB(), after, 10_000, false)
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			break
		}
		for _, row := range rows {
			after = row.Seq
			processed[row.ID] = row.Attempt
		}
	}
	arrived := make(map[string]int, r.total)
	total, repeated := 0, 0
	err := exampleapi.EachArrival(path, func(a exampleapi.Arrival) {
		total++
		arrived[a.ID]++
		if by, ok := processed[a.ID]; ok && a.Attempt > by {
			repeated++
		}
	})
	if err != nil {
		return err
	}
	quarantined, err := r.s.Requests(ctx, "state=quarantined")
	if err != nil {
		return err
	}
	open, err := r.s.Requests(ctx, "state=failed,received")
	if err != nil {
		return err
	}
	order, err := exampleapi.ReplayOrder(path)
	if err != nil {
		return err
	}
	lost, killed := 0, 0
	for _, id := range r.ids {
		_, ok := processed[id.String()]
		if slices.Contains(r.killing, id) {
			killed += arrived[id.String()]
			ok = slices.ContainsFunc(quarantined, func(q harness.Request) bool { return q.ID == id.String() })
		}
		if !ok {
			lost++
		}
	}

	var used time.Duration
	for _, p := range r.processes {
		one, _ := p.Usage()
		used += one
	}
	first, last, peak := r.memory()
	slices.Sort(r.rates)
	fmt.Printf(`%d requests in %s: %.0f/s over all; in the median of seconds in which some arrived, %.0f/s
CPU of the replayers %.0f µs per request; memory of the last one %.0f MiB in its first quarter, %.0f MiB in its last, peak %.0f MiB (%d samples)
arrivals %d: again without having been processed %d, again though processed (one effect) %d
lost %d, open %d, quarantined %d, crashes %d (by killers %d); order: %d arrivals of %d keys, %d breaches
`,
		r.total, r.took.Round(100*time.Millisecond), float64(r.total)/r.took.Seconds(), median(r.rates),
		used.Seconds()*1e6/float64(r.total), first, last, peak, len(r.samples),
		total, total-len(arrived)-repeated, repeated,
		lost, len(open), len(quarantined), r.api.Crashes(), killed, order.Arrivals, order.Keys, len(order.Broken))

	const exitHeld = 4 // only quarantined ones are left
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(r.last().ExitCode() == exitHeld, "the replay ended with exit code %d:\n%s", r.last().ExitCode(), r.last().Tail(4<<10))
	check(lost == 0, "%d requests are lost", lost)
	check(len(open) == 0, "%d requests are still open", len(open))
	check(len(quarantined) == killers, "%d requests are quarantined, not %d", len(quarantined), killers)
	check(len(processed) == r.total-killers, "%d requests were processed, not %d", len(processed), r.total-killers)
	check(order.Kept() && order.Keys == keys, "the order of %d keys was not kept: %s", order.Keys, strings.Join(order.Broken, "\n"))
	check(last <= first*flatShare+flatMore, "the replayer's memory grew from %.0f to %.0f MiB", first, last)
	return errors.Join(errs...)
}

// memory gives the medians of the first and the last quarter, and the greatest.
func (r *recovery) memory() (first, last, peak float64) {
	var all []float64
	for _, s := range r.samples {
		if s > 0 { // else it was gone
			all = append(all, s)
			peak = max(peak, s)
		}
	}
	quarter := max(len(all)/4, 1)
	if len(all) < 4 {
		return peak, peak, peak
	}
	return median(slices.Clone(all[:quarter])), median(slices.Clone(all[len(all)-quarter:])), peak
}

// median sorts what it is given.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// rss is the resident set of a process in MiB, 0 when it is gone.
func rss(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return 0
	}
	kb, err := strconv.Atoi(fields[0])
	if err != nil {
		return 0
	}
	return float64(kb) / 1024
}

// tail counts the lines of a file that grows.
type tail struct {
	path  string
	file  *os.File
	lines int
}

func (t *tail) read() error {
	if t.file == nil {
		var err error
		if t.file, err = os.Open(t.path); err != nil {
			return fmt.Errorf("count arrivals: %w", err)
		}
	}
	buf := make([]byte, 256<<10)
	for {
		n, err := t.file.Read(buf)
		t.lines += bytes.Count(buf[:n], []byte{'\n'})
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("count arrivals: %w", err)
		}
	}
}

func (t *tail) close() {
	if t.file != nil {
		_ = t.file.Close()
	}
}
