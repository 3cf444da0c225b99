// Command demo tells Holdfast's story with real processes, in under a minute:
// clients send requests, the API is killed in the middle and comes back,
// Holdfast itself is killed under load and comes back. One of the requests that
// the API has missed kills it: the replay finds out which, puts it into
// quarantine, and keeps back what comes after it by its ordering key, until a
// second replay is told to go on without it. Then the records of clients and API
// are compared. The demo fails when anything was lost or out of order, and when a
// fault did not bite.
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
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	_ "modernc.org/sqlite" // the ledger's write lock is taken with SQL

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/history"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// What must have happened for the demo to prove anything.
const (
	leastFailed     = 100 // requests that failed before the replay
	leastUnrecorded = 1   // answered requests that were not in the ledger at the kill
	leastCrashes    = 2   // of the API in the replay, by one request
	leastBehind     = 3   // failed requests that come after that one by their key
	keys            = 8
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
	api      *exampleapi.Keeper
	load     *history.Load
	callers  *callers
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
	addr, err := proc.FreeAddr()
	if err != nil {
		return err
	}
	d.api = exampleapi.NewKeeper(d.bin, d.dir, addr, "-crash-body", poison)
	if err := d.api.Start(ctx); err != nil {
		return err
	}
	defer d.api.Kill()
	d.sys, err = harness.New(harness.Options{
		Topology: harness.Standalone, Bin: d.bin, Dir: d.dir, Upstream: d.api.URL(),
		Settings: map[string]string{
			"ORDER_BY": "header:" + exampleapi.HeaderKey, "ACCESS_LOG": "off",
			"UPSTREAM_TIMEOUT": "3s", "GRACE": "2s", // short, so that the story is
		},
	})
	if err != nil {
		return err
	}
	defer d.sys.Close()
	if err := d.sys.Start(ctx); err != nil {
		return err
	}
	d.say("an API listens on %s; holdfast standalone is in front of it on %s", addr, d.sys.IngressURL())

	d.load = &history.Load{URL: d.sys.IngressURL() + "/v1/calls", Clients: 16, Requests: d.requests, Pause: 15 * time.Millisecond, Size: 512, Seed: 1}
	d.load.Start()
	defer d.load.Stop()
	d.callers = &callers{url: d.load.URL, keys: keys, pause: d.load.Pause}
	d.callers.start()
	calling := true
	stopCalling := func() {
		if calling {
			d.callers.wait()
		}
		calling = false
	}
	defer stopCalling()
	d.say("16 clients send %d requests, and %d more send calls that have to keep their order", d.requests, keys)

	if err := d.killAPI(ctx); err != nil {
		return err
	}
	unrecorded, err := d.killHoldfast(ctx)
	if err != nil {
		return err
	}
	d.load.Wait()
	stopCalling()
	_, failed := d.load.Count()
	d.say("all requests are sent; %d of them got a 5xx or a broken connection", failed)

	crashes, err := d.replay(ctx)
	if err != nil {
		return err
	}
	return d.judge(ctx, failed, unrecorded, crashes)
}

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
	d.say("kill -9 the API, under load; while it is away, a request comes in of which it will die")
	d.callers.killer.Store(true)
	err := d.until(ctx, func(_, failed int) bool {
		sent, behind := d.callers.progress()
		return sent && behind >= leastBehind && failed >= 2*leastFailed
	})
	if err != nil {
		return err
	}
	if err := d.api.Start(ctx); err != nil {
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

// replay shows the plan, runs both replays, and says how often the API died of them.
func (d *demo) replay(ctx context.Context) (crashes int, err error) {
	before := d.api.Crashes()
	d.say("replayer plan")
	code, out, err := d.sys.Replay(ctx, "plan")
	if err != nil {
		return 0, err
	}
	fmt.Println(out)
	if code != 0 {
		return 0, fmt.Errorf("the plan ended with exit code %d", code)
	}
	for _, run := range []struct {
		args []string
		code int // what is left by then
	}{
		{nil, exitReplayable},
		{[]string{"--past-blocked"}, exitHeld},
	} {
		args := append([]string{"run", "--wait", "30s", "--concurrency", "8"}, run.args...)
		d.say("replayer %s", strings.Join(args, " "))
		code, out, err := d.sys.Replay(ctx, args...)
		if err != nil {
			return 0, err
		}
		fmt.Println(out)
		if code != run.code {
			return 0, fmt.Errorf("the replay ended with exit code %d, not %d", code, run.code)
		}
	}
	return d.api.Crashes() - before, nil
}

// Exit codes of replayer run.
const (
	exitReplayable = 3 // some are still replayable
	exitHeld       = 4 // only quarantined ones are left
)

func (d *demo) judge(ctx context.Context, failed, unrecorded, crashes int) error {
	sent, killer := d.callers.history()
	v, err := history.Check(ctx, append(d.load.Sent(), sent...), d.api.DB())
	if err != nil {
		return err
	}
	quarantined, err := d.sys.Requests(ctx, "state=quarantined")
	if err != nil {
		return err
	}
	// What is held for an operator to decide is not lost.
	v.Lost = slices.DeleteFunc(v.Lost, func(s history.Sent) bool {
		return slices.ContainsFunc(quarantined, func(q harness.Request) bool { return q.ID == s.ID })
	})
	order, err := exampleapi.ReplayOrder(exampleapi.ArrivalsFile(d.api.DB()))
	if err != nil {
		return err
	}
	byKiller := 0 // crashes, by the API's own record
	err = exampleapi.EachArrival(exampleapi.ArrivalsFile(d.api.DB()), func(a exampleapi.Arrival) {
		if a.ID == killer.ID && a.Replay != "" {
			byKiller++
		}
	})
	if err != nil {
		return err
	}
	kept := "no"
	if order.Kept() {
		kept = "yes"
	}
	d.say("what the clients' and the API's own records say:\n\n%s", strings.TrimRight(v.String(), "\n"))
	fmt.Printf("  %-26s %6d\n  %-26s %6d\n  %-26s %6d\n  %-26s %6s\n", "quarantined", len(quarantined),
		"crashes of the API by it", byKiller, "keys in the replay", order.Keys, "order kept", kept)
	switch {
	case failed < leastFailed:
		return fmt.Errorf("only %d requests failed before the replay, %d are needed to prove anything", failed, leastFailed)
	case unrecorded < leastUnrecorded:
		return errors.New("every answered request was in the ledger when holdfast was killed: that kill proved nothing")
	case v.Replayed == 0:
		return errors.New("nothing was replayed")
	case byKiller < leastCrashes:
		return fmt.Errorf("the API died %d times of the killer in the replay, %d are needed to prove anything", byKiller, leastCrashes)
	case crashes != byKiller:
		return fmt.Errorf("the API died %d times in the replay, but met the killer %d times", crashes, byKiller)
	case len(quarantined) != 1 || quarantined[0].ID != killer.ID:
		return fmt.Errorf("quarantined is %+v, and not the killer %s alone", quarantined, killer.ID)
	case order.Keys < keys:
		return fmt.Errorf("requests of %d keys were replayed, not of all %d", order.Keys, keys)
	case !order.Kept():
		return fmt.Errorf("the order of keys was not kept:\n%s", strings.Join(order.Broken, "\n"))
	}
	return v.Err()
}
