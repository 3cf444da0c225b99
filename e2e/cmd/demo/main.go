// Command demo tells Holdfast's story with real processes, in under a minute:
// clients send requests, the API is killed in the middle and comes back,
// Holdfast itself is killed under load and comes back, one replay is run, and
// the records of clients and API are compared. It fails when anything was lost,
// and when a fault did not bite.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	_ "modernc.org/sqlite" // the ledger's write lock is taken with SQL

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/history"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// What must have happened for the demo to prove anything.
const (
	leastFailed     = 100 // requests that failed before the replay
	leastUnrecorded = 1   // answered requests that were not in the ledger at the kill
)

func main() {
	d := demo{began: time.Now()}
	flag.StringVar(&d.bin, "bin", "bin", "directory of the binaries")
	flag.IntVar(&d.requests, "requests", 4000, "how many requests are sent")
	keep := flag.Bool("keep", false, "keep the directory with all data and logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	err := d.run(ctx)
	if *keep || err != nil {
		fmt.Println("data and logs are in", d.dir)
	} else {
		_ = os.RemoveAll(d.dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		stop()
		cancel()
		os.Exit(1)
	}
}

type demo struct {
	bin      string
	requests int
	dir      string
	began    time.Time
	sys      *harness.System
	api      *proc.Process
	apiAddr  string
	load     *history.Load
}

func (d *demo) say(format string, args ...any) {
	fmt.Printf("%5.1fs  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context) (err error) {
	if d.dir, err = os.MkdirTemp("", "holdfast-demo-"); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	if d.bin, err = filepath.Abs(d.bin); err != nil {
		return fmt.Errorf("find the binaries: %w", err)
	}
	if d.apiAddr, err = proc.FreeAddr(); err != nil {
		return err
	}
	if err := d.startAPI(ctx); err != nil {
		return err
	}
	defer func() { d.api.Kill() }()
	d.sys, err = harness.New(harness.Options{
		Topology: harness.Standalone, Bin: d.bin, Dir: d.dir, Upstream: "http://" + d.apiAddr,
		// Short, so that the story is.
		Settings: map[string]string{"UPSTREAM_TIMEOUT": "3s", "GRACE": "2s", "ACCESS_LOG": "off"},
	})
	if err != nil {
		return err
	}
	defer d.sys.Close()
	if err := d.sys.Start(ctx); err != nil {
		return err
	}
	d.say("an API listens on %s; holdfast standalone is in front of it on %s", d.apiAddr, d.sys.IngressURL())

	d.load = &history.Load{URL: d.sys.IngressURL() + "/v1/calls", Clients: 16, Requests: d.requests, Pause: 15 * time.Millisecond, Size: 512, Seed: 1}
	d.load.Start()
	defer d.load.Stop()
	d.say("16 clients send %d requests", d.requests)

	if err := d.killAPI(ctx); err != nil {
		return err
	}
	unrecorded, err := d.killHoldfast(ctx)
	if err != nil {
		return err
	}
	d.load.Wait()
	_, failed := d.load.Count()
	d.say("all requests are sent; %d of them got a 5xx or a broken connection", failed)

	if err := d.replay(ctx); err != nil {
		return err
	}
	return d.judge(ctx, failed, unrecorded)
}

func (d *demo) startAPI(ctx context.Context) error {
	p, err := proc.Start(proc.Spec{
		Name: "exampleapi", Path: filepath.Join(d.bin, "exampleapi"), Dir: d.dir,
		Args: []string{"-addr", d.apiAddr, "-db", d.db()},
	})
	if err != nil {
		return err
	}
	d.api = p
	return proc.AwaitHTTP(ctx, p, "http://"+d.apiAddr+"/stats")
}

func (d *demo) db() string { return filepath.Join(d.dir, "api.db") }

// until waits for a condition on the load's progress.
func (d *demo) until(ctx context.Context, cond func(ended, failed int) bool) error {
	for {
		if cond(d.load.Count()) {
			return nil
		}
		if ended, _ := d.load.Count(); ended >= d.requests {
			return errors.New("the load ended too early for the story")
		}
		timer := time.NewTimer(5 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

func (d *demo) killAPI(ctx context.Context) error {
	if err := d.until(ctx, func(ended, _ int) bool { return ended >= d.requests/5 }); err != nil {
		return err
	}
	d.api.Kill()
	d.say("kill -9 the API, under load")
	if err := d.until(ctx, func(_, failed int) bool { return failed >= 2*leastFailed }); err != nil {
		return err
	}
	if err := d.startAPI(ctx); err != nil {
		return err
	}
	_, failed := d.load.Count()
	d.say("the API is back; %d requests have failed", failed)
	return nil
}

// killHoldfast kills standalone while requests are answered that are in no
// ledger yet: its write lock is held, so that only the spool has them.
func (d *demo) killHoldfast(ctx context.Context) (unrecorded int, err error) {
	before, _ := d.load.Count()
	if err := d.until(ctx, func(ended, _ int) bool { return ended >= before+d.requests/8 }); err != nil {
		return 0, err
	}
	db, err := sql.Open("sqlite", "file:"+d.sys.Ledger()+"?_pragma=busy_timeout(10000)")
	if err != nil {
		return 0, fmt.Errorf("open the ledger: %w", err)
	}
	defer db.Close()
	lock, err := db.Conn(ctx)
	if err != nil {
		return 0, fmt.Errorf("open the ledger: %w", err)
	}
	defer lock.Close()
	if _, err := lock.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return 0, fmt.Errorf("lock the ledger: %w", err)
	}
	locked, _ := d.load.Count()
	if err := d.until(ctx, func(ended, _ int) bool { return ended >= locked+100 }); err != nil {
		return 0, err
	}
	d.sys.Kill(harness.Ingress)
	sent := d.load.Sent()
	for _, s := range sent[locked:] {
		id, err := uuid.Parse(s.ID)
		if err != nil || !s.Answered() {
			continue
		}
		var n int
		if err := lock.QueryRowContext(ctx, "SELECT count(*) FROM requests WHERE id = ?", id[:]).Scan(&n); err != nil {
			return 0, fmt.Errorf("look into the ledger: %w", err)
		}
		if n == 0 {
			unrecorded++
		}
	}
	if _, err := lock.ExecContext(ctx, "ROLLBACK"); err != nil {
		return 0, fmt.Errorf("unlock the ledger: %w", err)
	}
	d.say("kill -9 holdfast, under load; %d answered requests are in no ledger yet", unrecorded)
	if err := d.sys.Start(ctx); err != nil {
		return 0, err
	}
	d.say("holdfast is back")
	return unrecorded, nil
}

func (d *demo) replay(ctx context.Context) error {
	d.say("replayer run")
	code, out, err := d.sys.Replay(ctx, "run", "--wait", "30s", "--concurrency", "8")
	if err != nil {
		return err
	}
	fmt.Println(out)
	if code != 0 {
		return fmt.Errorf("the replay ended with exit code %d", code)
	}
	return nil
}

func (d *demo) judge(ctx context.Context, failed, unrecorded int) error {
	v, err := history.Check(ctx, d.load.Sent(), d.db())
	if err != nil {
		return err
	}
	d.say("what the clients' and the API's own records say:\n\n%s", v)
	if failed < leastFailed {
		return fmt.Errorf("only %d requests failed before the replay, %d are needed to prove anything", failed, leastFailed)
	}
	if unrecorded < leastUnrecorded {
		return errors.New("every answered request was in the ledger when holdfast was killed: that kill proved nothing")
	}
	if v.Replayed == 0 {
		return errors.New("nothing was replayed")
	}
	return v.Err()
}
