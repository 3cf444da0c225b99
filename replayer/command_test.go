package replayer_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

// nowhere is an address that nobody listens on.
const nowhere = "nats://127.0.0.1:1"

func TestEverythingThatIsWrongIsSaidAtOnce(t *testing.T) {
	b := newBooks(t)
	p := command(t, b, nowhere, "", "run", "--since", "yesterday", "--until=1h", "--state", "discarded,lost", "--status", "600",
		"--route", "A", "--path", "x", "--id", "1", "--limit", "0", "--rate=-1", "--concurrency", "many", "--bogus", "--output", "xml",
		"-x", "something", "--upstream", "http://h/path", "--wait", "1")
	p.Env = append(p.Env, "HOLDFAST_REPLAY_MAX_ATTEMPTS=none", "HOLDFAST_REPLAY_ORDER_BY=header:", "HOLDFAST_REPLAY_PAST_BLOCKED=perhaps", "HOLDFAST_REPLAY_HEALTH_PATH=healthz", "HOLDFAST_LOG_LEVEL=loud", "HOLDFAST_SPOOL_DIRR=x")
	require.Equal(t, 2, p.code(t))
	require.Empty(t, p.stdout.String())
	for _, want := range []string{
		`--since: "yesterday"`, `--state: "discarded" requests cannot be chosen`, `--state: "lost"`, `--status: "600"`, `--route: "A"`,
		`--path: "x"`, `--id: "1"`, `--limit: "0"`, `--rate: "-1"`, `--concurrency: "many"`, `--bogus: is not a flag`, `-x: is not a flag`,
		`--output: "xml"`, `--upstream: has a path`, `--wait: "1"`, `HOLDFAST_REPLAY_MAX_ATTEMPTS: "none"`,
		`HOLDFAST_REPLAY_ORDER_BY: "header:" is not allowed`, `HOLDFAST_REPLAY_PAST_BLOCKED: "perhaps"`, `HOLDFAST_REPLAY_HEALTH_PATH: "healthz"`, `HOLDFAST_LOG_LEVEL: "loud"`, `HOLDFAST_SPOOL_DIRR: is not the name of a setting`,
	} {
		require.Contains(t, p.stderr.String(), want)
	}
}

func TestUsageOfEveryCommand(t *testing.T) {
	b := newBooks(t)
	for args, want := range map[string]string{
		"":                                       "a command is needed",
		"bogus":                                  `"bogus" is not a command`,
		"run --since":                            "flag needs an argument: --since",
		"run now":                                `"now" is not expected here`,
		"run":                                    "HOLDFAST_UPSTREAM_URL: is required",
		"plan --state quarantined":               "see replayer quarantine",
		"run --state processed":                  "a test replay with --upstream may send them",
		"run --again":                            "--again: needs --upstream",
		"run --ignore $.id":                      "--ignore: needs --upstream",
		"run --upstream http://h --ignore id":    `--ignore: "id" begins with $`,
		"run --speed 0":                          `--speed: "0" is not a factor`,
		"run --speed 2 --rate 5":                 "--speed: does not go with --rate",
		"run --max-gap 1":                        `--max-gap: "1" is not a duration`,
		"plan --since 1h --until 2h":             "--since: is not before --until",
		"runs":                                   "one of list, show, cancel",
		"runs show":                              "the ID of one run is needed",
		"runs cancel 7":                          `"7" is not the ID of a run`,
		"discard --reason x":                     "needs a filter, or --all",
		"discard --all":                          "--reason: is required",
		"discard --all --reason x --method POST": "does not go with filters",
		"quarantine":                             "one of list, release, discard",
		"quarantine release":                     "the UUID of a request is needed",
		"quarantine release x":                   `ID: "x" is not a UUID`,
		"quarantine discard " + uuid.NewString(): "--reason: is required",
	} {
		t.Run(args, func(t *testing.T) {
			p := command(t, b, nowhere, "", strings.Fields(args)...)
			require.Equal(t, 2, p.code(t))
			require.Contains(t, p.stderr.String(), want)
		})
	}
}

func TestHelpShowsEveryFlagAndSetting(t *testing.T) {
	b := newBooks(t)
	p := command(t, b, nowhere, "", "run", "--help")
	require.Equal(t, 0, p.code(t))
	help := p.stdout.String()
	for _, flag := range strings.Fields("since until state status route method path id limit rate concurrency max-attempts order-by past-blocked upstream health-path wait pause-limit fence-timeout ignore-ingress output") {
		require.Contains(t, help, "--"+flag+" ")
		require.Contains(t, help, "HOLDFAST_REPLAY_"+strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))+")")
	}
	for _, want := range []string{"(default: 4; ", "(default: 5m; ", "HOLDFAST_LEDGER_URL", "HOLDFAST_NATS_URL", "HOLDFAST_UPSTREAM_URL"} {
		require.Contains(t, help, want)
	}
	p = command(t, b, nowhere, "", "--version")
	require.Equal(t, 0, p.code(t))
	require.Regexp(t, `^replayer \S+ go1`, p.stdout.String())
	p = command(t, b, nowhere, "", "--check-config")
	require.Equal(t, 0, p.code(t))
	require.Equal(t, "configuration is valid\n", p.stdout.String())
}

func TestCouldNotRun(t *testing.T) {
	b := newBooks(t)
	b.capture(t, request{})
	a := newAPI(t, nil)
	t.Run("no ledger", func(t *testing.T) {
		p := command(t, &books{path: filepath.Join(t.TempDir(), "none.db")}, nowhere, a.URL, "run")
		require.Equal(t, 1, p.code(t))
		require.Contains(t, p.stderr.String(), "no ledger there")
	})
	t.Run("not a ledger", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "ledger.db")
		require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("not a ledger ", 1000)), 0o600))
		p := command(t, &books{path: path}, nowhere, a.URL, "plan")
		require.Equal(t, 1, p.code(t))
		require.Contains(t, p.stderr.String(), ledger.ErrDamaged.Error())
	})
	t.Run("no broker", func(t *testing.T) {
		p := command(t, b, nowhere, a.URL, "run", "--fence-timeout", "1ms", "--output", "json")
		require.Equal(t, 1, p.code(t))
		report := p.report(t)
		require.Equal(t, replayer.EndFailed, report.End)
		require.Contains(t, report.Reason, "the acker cannot be asked for")
	})
	require.Empty(t, a.seen())
}

func TestExitCodesOfRun(t *testing.T) {
	n := newBroker(t)
	for status, code := range map[int]int{200: 0, 422: 4, 500: 3} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			b := newBooks(t)
			b.capture(t, many(5)...)
			a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) { w.WriteHeader(status) })
			p := command(t, b, n.server.ClientURL(), a.URL, "run", "--max-attempts=1", "--output", "json")
			p.Env = append(p.Env, "HOLDFAST_REPLAY_MAX_ATTEMPTS=1000", "HOLDFAST_REPLAY_CONCURRENCY=2")
			require.Equal(t, code, p.code(t), p.stderr.String())
			report := p.report(t)
			require.Equal(t, code, report.ExitCode)
			require.Equal(t, int64(5), report.Sent)
			require.Len(t, a.seen(), 5)
			if code != 0 {
				require.Len(t, report.Failures, 5)
				require.NotEmpty(t, report.Next)
			}
			// The shape that scripts read.
			var shape map[string]any
			require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &shape))
			for _, key := range []string{"run", "picked_up", "filter", "selected", "sent", "processed", "failed", "rejected", "unknown", "skipped",
				"total", "left", "newer", "started_at", "ended_at", "duration_seconds", "rate_per_second", "end", "exit_code"} {
				require.Contains(t, shape, key)
			}
		})
	}
}

func TestTextReport(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	ids := b.capture(t, many(2)...)
	a := newAPI(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		if r.Header.Get(capture.HTTPHeaderID) == ids[1].String() {
			w.WriteHeader(http.StatusUnprocessableEntity)
		}
	})
	p := command(t, b, n.server.ClientURL(), a.URL, "run")
	require.Equal(t, 4, p.code(t), p.stderr.String())
	for _, want := range []string{
		"(finished)", "selection  replayable: 2", "sent       2 in ", "processed 1, failed 0, rejected 1", "left       replayable 0, waiting 0, quarantined 0, rejected 1",
		ids[1].String() + "  attempt 2  rejected  status 422", "replayer plan --state rejected",
	} {
		require.Contains(t, p.stdout.String(), want)
	}
	require.Contains(t, p.stderr.String(), `"msg":"replaying"`)
}

func TestSignalsEndTheRunInOrderAndTheNextGoesOn(t *testing.T) {
	n := newBroker(t)
	for s, code := range map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143} {
		t.Run(s.String(), func(t *testing.T) {
			b := newBooks(t)
			b.capture(t, many(50)...)
			arrived, release := make(chan struct{}), make(chan struct{})
			var once sync.Once
			a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
				once.Do(func() { close(arrived) })
				<-release
			})
			p := command(t, b, n.server.ClientURL(), a.URL, "run", "--concurrency", "2", "--output", "json")
			require.NoError(t, p.Start())
			<-arrived
			require.NoError(t, p.Process.Signal(s))
			close(release)
			require.Equal(t, code, p.wait(t), p.stderr.String())
			report := p.report(t)
			require.Equal(t, replayer.EndInterrupted, report.End)
			require.Equal(t, code, report.ExitCode)
			require.Equal(t, int64(len(a.seen())), report.Processed, "what was in flight was finished")

			again := command(t, b, n.server.ClientURL(), a.URL, "run", "--output", "json")
			require.Equal(t, 0, again.code(t), again.stderr.String())
			require.True(t, again.report(t).PickedUp)
			require.Equal(t, report.Run, again.report(t).Run)
			require.Len(t, a.seen(), 50)
		})
	}
}

func TestASecondSignalCutsWhatIsInFlight(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	ids := b.capture(t, many(1)...)
	arrived, release := make(chan struct{}), make(chan struct{})
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		close(arrived)
		<-release
	})
	defer close(release)
	p := command(t, b, n.server.ClientURL(), a.URL, "run", "--output", "json")
	require.NoError(t, p.Start())
	<-arrived
	require.NoError(t, p.Process.Signal(syscall.SIGTERM))
	// Of the same signal two that come at once are one.
	require.NoError(t, p.Process.Signal(syscall.SIGINT))
	code := p.wait(t)
	require.Contains(t, []int{130, 143}, code)
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, capture.StateFailed, d.State)
	require.Equal(t, 2, d.Attempts)
}

// TestKilledAtRandomMoments kills the command while it sends; at the end
// everything is processed, and nothing was sent that the ledger had not begun.
func TestKilledAtRandomMoments(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	b, n := newBooks(t), newBroker(t)
	ids := b.capture(t, many(400)...)
	var mu sync.Mutex
	arrivals, next := 0, 0
	reached := make(chan struct{}, 1)
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		mu.Lock()
		defer mu.Unlock()
		if arrivals++; arrivals == next {
			reached <- struct{}{}
		}
	})
	runs := make(map[string]bool)
	for range 4 {
		mu.Lock()
		next = arrivals + 5 + random.IntN(60)
		mu.Unlock()
		p := command(t, b, n.server.ClientURL(), a.URL, "run", "--concurrency", "8")
		require.NoError(t, p.Start())
		<-reached
		require.NoError(t, p.Process.Kill())
		p.wait(t)
		// What time would do: the dead process's lease of the run ends. Those of
		// what it had in flight stay.
		elsewhere := openBooks(t, b.path)
		elsewhere.later(time.Minute)
		run, lease, picked, err := elsewhere.OpenRun(t.Context(), ledger.Filter{Replayable: true}, "", "time", time.Second)
		require.NoError(t, err)
		require.True(t, picked)
		runs[run.ID] = true
		require.NoError(t, elsewhere.LeaveRun(t.Context(), lease))
		elsewhere.ahead.Store(0)
		_, err = elsewhere.KeepRun(t.Context(), lease, -time.Second)
		require.NoError(t, err)
	}
	require.Len(t, runs, 1, "all of them worked on one run")
	b.later(time.Hour)
	o := options(t, b, a.URL)
	o.Fence = n.fence(b)
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, report.Reason)
	require.True(t, report.PickedUp)
	require.Equal(t, map[capture.State]int64{capture.StateProcessed: 400}, b.states(t))
	unresolved := 0
	times := a.times()
	for _, id := range ids {
		d, err := b.Get(t.Context(), id)
		require.NoError(t, err)
		require.GreaterOrEqual(t, times[id.String()], 1)
		begun := 0
		for _, attempt := range d.Facts.Attempts {
			if attempt.Run != "" {
				begun++
			}
			if attempt.Run != "" && attempt.EndedAt.IsZero() {
				unresolved++
			}
		}
		require.LessOrEqual(t, times[id.String()], begun, "sent more often than begun")
	}
	t.Logf("%d attempts had no result", unresolved)
	for _, one := range a.seen() {
		require.Equal(t, report.Run, one.run)
	}
}

func TestPlanShowsAndSendsNothing(t *testing.T) {
	b := newBooks(t)
	graceful := newPolicy()
	graceful.Grace = time.Hour
	ids := b.capture(t,
		request{target: "/a\x01\xff", body: []byte("12345")}, request{method: "PUT", target: "/b/c", status: 500, route: "calls"},
		request{policy: graceful, status: -1}, request{status: 401}, request{status: 200}, request{target: "/held"},
	)
	require.NoError(t, b.Quarantine(t.Context(), ids[5], capture.QuarantineLate, "too late"))
	before := b.states(t)

	routes := routesFile(t, "default", "http://a", "calls", "http://b")
	plan := func(args ...string) replayer.Plan {
		p := command(t, b, nowhere, "", append([]string{"plan", "--output", "json"}, args...)...)
		p.Env = append(p.Env, routes)
		require.Equal(t, 0, p.code(t), p.stderr.String())
		var plan replayer.Plan
		require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &plan))
		return plan
	}
	all := plan("--rate", "0.5")
	require.Equal(t, int64(2), all.Requests)
	require.Equal(t, int64(5), all.Bytes)
	require.Equal(t, int64(1), all.Waiting)
	require.Equal(t, int64(1), all.Quarantined)
	require.Equal(t, 4.0, all.Seconds)
	require.Equal(t, map[string]int64{"default": 1, "calls": 1}, all.Routes)
	require.Equal(t, map[string]int64{"500": 1, "502": 1}, all.Statuses)
	require.Equal(t, map[capture.State]int64{capture.StateFailed: 2}, all.States)
	require.Equal(t, ids[0], all.Sample[0].ID)
	require.Equal(t, "/a%01%FF", all.Sample[0].Target)
	require.Equal(t, 1, all.Sample[0].Attempts)

	require.Equal(t, int64(1), plan("--status", "401").Requests)
	require.Equal(t, int64(1), plan("--state", "rejected").Requests)
	require.Equal(t, int64(1), plan("--path", "/b/*").Requests)
	require.Equal(t, int64(1), plan("--route", "calls,other").Requests)
	require.Equal(t, int64(1), plan("--method", "PUT").Requests)
	require.Equal(t, int64(2), plan("--id", ids[0].String()+","+ids[3].String(), "--id", ids[4].String()).Requests)
	require.Equal(t, int64(0), plan("--until", "1h").Requests)
	require.Equal(t, int64(2), plan("--since", "1h", "--limit", "9").Requests)
	require.Equal(t, int64(1), plan("--limit", "1").Requests)

	// Without the file there is the default route alone, and --upstream asks for
	// none.
	require.Empty(t, all.Unrouted)
	routes = ""
	alone := plan()
	require.Equal(t, int64(1), alone.Requests)
	require.Equal(t, map[string]int64{"calls": 1}, alone.Unrouted)
	require.Equal(t, int64(2), plan("--upstream", "http://other").Requests)

	p := command(t, b, nowhere, "", "plan")
	require.Equal(t, 0, p.code(t))
	require.Contains(t, p.stdout.String(), "no route   calls 1 (would be left alone)")
	p = command(t, b, nowhere, "", "plan")
	p.Env = append(p.Env, routesFile(t, "default", "http://a", "calls", "http://b"))
	require.Equal(t, 0, p.code(t))
	for _, want := range []string{"to send    2 requests, 5 B of bodies", "states     failed 2", "not sent   waiting 1, quarantined 1, payload gone 0", "4 at a time", ids[1].String()} {
		require.Contains(t, p.stdout.String(), want)
	}
	require.Equal(t, before, b.states(t))
	runs, _, err := b.Runs(t.Context(), "", 10)
	require.NoError(t, err)
	require.Empty(t, runs)
}

func TestRunsListShowCancel(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(3)...)
	run, lease, _, err := b.OpenRun(t.Context(), ledger.Filter{Replayable: true, Methods: []string{"POST"}}, "", "host/1", time.Minute)
	require.NoError(t, err)
	o := options(t, b, newAPI(t, nil).URL)
	done := mustRun(t, o)

	p := command(t, b, nowhere, "", "runs", "list", "--output", "json")
	require.Equal(t, 0, p.code(t))
	var list struct{ Runs []replayer.RunView }
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &list))
	require.Len(t, list.Runs, 2)
	p = command(t, b, nowhere, "", "runs", "list")
	require.Equal(t, 0, p.code(t))
	require.Contains(t, p.stdout.String(), run.ID+"  active ")
	require.Contains(t, p.stdout.String(), "replayable, method POST")

	p = command(t, b, nowhere, "", "runs", "show", done.Run)
	require.Equal(t, 0, p.code(t))
	require.Contains(t, p.stdout.String(), "(finished)")
	require.Contains(t, p.stdout.String(), `"exit_code": 0`)
	p = command(t, b, nowhere, "", "runs", "show", uuid.NewString())
	require.Equal(t, 1, p.code(t))
	require.Contains(t, p.stderr.String(), "not found")

	p = command(t, b, nowhere, "", "runs", "cancel", run.ID)
	require.Equal(t, 0, p.code(t))
	require.Equal(t, ledger.RunCancelled, runOf(t, b, run.ID).State)
	_, err = b.Begin(t.Context(), lease, nil, ledger.BeginOptions{Lease: time.Second, MaxAttempts: 1})
	require.ErrorIs(t, err, ledger.ErrFenced)
	p = command(t, b, nowhere, "", "runs", "cancel", run.ID)
	require.Equal(t, 1, p.code(t))
	require.Contains(t, p.stderr.String(), "has ended already")
}

func TestDiscard(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, append(many(700), request{method: "PUT"}, request{status: 200}, request{status: 404})...)
	p := command(t, b, nowhere, "", "discard", "--method", "POST", "--state", "failed", "--limit", "600", "--reason", "a test")
	require.Equal(t, 0, p.code(t), p.stderr.String())
	require.Equal(t, "discarded 600\n", p.stdout.String())
	require.Equal(t, map[capture.State]int64{
		capture.StateDiscarded: 600, capture.StateFailed: 101, capture.StateProcessed: 1, capture.StateRejected: 1,
	}, b.states(t))
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, "a test", d.DiscardReason)
	p = command(t, b, nowhere, "", "discard", "--all", "--reason", "the rest", "--output", "json")
	require.Equal(t, 0, p.code(t))
	require.JSONEq(t, `{"discarded":102}`, p.stdout.String())
	require.Equal(t, map[capture.State]int64{capture.StateDiscarded: 702, capture.StateProcessed: 1}, b.states(t))
}

func TestQuarantine(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(3)...)
	for _, id := range ids {
		require.NoError(t, b.Quarantine(t.Context(), id, capture.QuarantineLate, "came late"))
	}
	p := command(t, b, nowhere, "", "quarantine", "list")
	require.Equal(t, 0, p.code(t), p.stderr.String())
	require.Contains(t, p.stdout.String(), ids[2].String())
	require.Contains(t, p.stdout.String(), "late")
	require.Contains(t, p.stdout.String(), "came late")
	p = command(t, b, nowhere, "", "quarantine", "list", "--limit", "2", "--output", "json")
	require.Equal(t, 0, p.code(t))
	var list struct {
		Quarantined []replayer.QuarantineView
		More        bool
	}
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &list))
	require.Len(t, list.Quarantined, 2)
	require.True(t, list.More)

	p = command(t, b, nowhere, "", "quarantine", "release", ids[0].String(), ids[1].String())
	require.Equal(t, 0, p.code(t))
	require.Equal(t, map[capture.State]int64{capture.StateFailed: 2, capture.StateQuarantined: 1}, b.states(t))
	p = command(t, b, nowhere, "", "quarantine", "release", ids[0].String())
	require.Equal(t, 1, p.code(t))
	require.Contains(t, p.stderr.String(), "is not quarantined")
	p = command(t, b, nowhere, "", "quarantine", "discard", ids[2].String(), "--reason", "hopeless")
	require.Equal(t, 0, p.code(t))
	require.Equal(t, map[capture.State]int64{capture.StateFailed: 2, capture.StateDiscarded: 1}, b.states(t))
	p = command(t, b, nowhere, "", "quarantine", "discard", ids[0].String(), "--reason", "hopeless")
	require.Equal(t, 1, p.code(t))
}
