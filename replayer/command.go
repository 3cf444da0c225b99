package replayer

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/open"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// Process is what the command needs of its process.
type Process struct {
	Args           []string // without the program's name
	Stdout, Stderr io.Writer
	// Signals gives those that ask to stop: the first ends a run in order, the
	// second cuts what is in flight.
	Signals <-chan os.Signal
}

// Main is the whole of the command. It returns the exit code.
func Main(p Process) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	a := &app{Process: p, stop: make(chan struct{}), cut: cancel}
	watching := make(chan struct{})
	defer func() { cancel(); <-watching }()
	go func() {
		defer close(watching)
		a.watch(ctx)
	}()

	cmd := a.root()
	cmd.SetArgs(p.Args)
	cmd.SetOut(p.Stdout)
	cmd.SetErr(p.Stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return a.code
	}
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		a.complain(usage.problems)
		return ExitUsage
	case !a.started:
		a.complain([]string{err.Error()})
		return ExitUsage
	}
	if code, ok := a.interrupted(); ok && (errors.Is(err, ErrInterrupted) || errors.Is(err, context.Canceled)) {
		return code
	}
	fmt.Fprintf(p.Stderr, "replayer: %v\n", err)
	return ExitFailed
}

// app is one invocation of the command.
type app struct {
	Process
	settings Settings
	table    *route.Table // of the routes file, nil without one
	logger   *slog.Logger
	stop     chan struct{} // closed by the first signal
	cut      context.CancelFunc
	signal   atomic.Int32 // the first signal, 0 while there was none
	orderly  atomic.Bool  // a run is on, which the first signal ends in order
	started  bool         // usage and settings are in order
	code     int
}

func (a *app) complain(problems []string) {
	for _, p := range problems {
		fmt.Fprintf(a.Stderr, "replayer: %s\n", p)
	}
	fmt.Fprintln(a.Stderr, "replayer --help shows every command, flag and setting.")
}

// watch hands signals on until ctx ends.
func (a *app) watch(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-a.Signals:
			number, _ := s.(syscall.Signal)
			first := a.signal.CompareAndSwap(0, int32(number))
			if first {
				close(a.stop)
			}
			if !first || !a.orderly.Load() {
				a.cut()
			}
		}
	}
}

// interrupted gives the exit code that tells of the first signal.
func (a *app) interrupted() (int, bool) {
	number := a.signal.Load()
	return 128 + int(number), number != 0
}

var errNoCommand = errors.New("a command is needed: plan, run, runs, discard, quarantine, export or import")

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "replayer",
		Short:         "Sends captured requests to the API again",
		Long:          "replayer sends captured requests to the API again, until it has processed them.\n\nExit codes: 0 nothing selected is left; 1 could not run; 2 bad usage or settings; 3 some are still\nreplayable, or answers of a test system differ; 4 only quarantined or rejected ones are left; 130, 143 interrupted, resumable.",
		Version:       service.Version() + " " + runtime.Version(),
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetVersionTemplate("replayer {{.Version}}\n")
	check := root.Flags().Bool("check-config", false, "check the settings and exit")
	root.Args = cobra.ArbitraryArgs
	a.does(root, func(v *values, args []string) func(context.Context) error {
		switch {
		case len(args) > 0:
			v.problems = append(v.problems, fmt.Sprintf("%q is not a command; there are plan, run, runs, discard, quarantine, export and import", args[0]))
		case !*check:
			v.problems = append(v.problems, errNoCommand.Error())
		}
		return func(context.Context) error {
			_, err := fmt.Fprintln(a.Stdout, "configuration is valid")
			return err
		}
	})
	root.AddCommand(a.planCommand(), a.runCommand(), a.runsCommand(), a.discardCommand(), a.quarantineCommand())
	root.AddCommand(a.exportCommand(), a.importCommand(), a.verifyCommand())

	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		help(cmd, args)
		fmt.Fprintln(cmd.OutOrStdout(), "\nSettings, from the environment:")
		_ = service.WriteSettings(cmd.OutOrStdout(), &Settings{}, false) // there is nobody else to tell
	})
	return root
}

// does gives a command its work. read takes flags and arguments, adding what is
// wrong to the values; the work that it returns is done when nothing is wrong,
// with the settings either.
func (a *app) does(cmd *cobra.Command, read func(v *values, args []string) func(context.Context) error) {
	cmd.FParseErrWhitelist = cobra.FParseErrWhitelist{UnknownFlags: true} // all of them are named below
	cmd.Args = cobra.ArbitraryArgs
	run := func(cmd *cobra.Command, args []string, problems []string) error {
		v := &values{flags: cmd.Flags(), getenv: environment, problems: problems}
		v.problems = append(v.problems, unknownFlags(a.argsOf(cmd), cmd.Flags())...)
		work := read(v, args)
		v.problems = append(v.problems, problemsOf(service.Load(&a.settings, false))...)
		v.problems = append(v.problems, a.loadRoutes()...)
		if len(v.problems) > 0 {
			return &usageError{problems: v.problems}
		}
		a.started = true
		a.logger = service.NewLogger(a.Stderr, a.settings.LogLevel, a.settings.LogFormat).With("service", "replayer")
		return work(cmd.Context())
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return run(cmd, args, nil) }
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return run(cmd, cmd.Flags().Args(), []string{err.Error()})
	})
}

// loadRoutes reads the routes file, and gives a line for each thing that is
// wrong with it.
func (a *app) loadRoutes() []string {
	if a.settings.RoutesFile == "" {
		return nil
	}
	// Nothing here asks how large a body may be.
	table, err := route.Load(service.Routes{RoutesFile: a.settings.RoutesFile}, 0)
	a.table = table
	if wrong, ok := errors.AsType[*route.FileError](err); ok {
		lines := wrong.Lines()
		for i, line := range lines {
			lines[i] = "HOLDFAST_ROUTES_FILE: " + line
		}
		return lines
	}
	return problemsOf(err)
}

// known gives what reports whether there is a route, nil when all lead to
// another system.
func (a *app) known(send sending) func(string) bool {
	switch {
	case send.upstream != nil:
		return nil
	case a.table != nil:
		return func(name string) bool { return a.table.ByName(name) != nil }
	}
	return func(name string) bool { return name == capture.DefaultRoute }
}

// argsOf gives the arguments that follow the command's name.
func (a *app) argsOf(cmd *cobra.Command) []string {
	args := a.Args
	for _, name := range strings.Fields(cmd.CommandPath())[1:] {
		for i, arg := range args {
			if arg == name {
				args = args[i+1:]
				break
			}
		}
	}
	return args
}

// none refuses arguments.
func none(v *values, args []string) {
	for _, arg := range args {
		v.problems = append(v.problems, fmt.Sprintf("%q is not expected here", arg))
	}
}

func (a *app) planCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "plan [flags]", Short: "Show what run would send, and send nothing"}
	addFlags(cmd, append(append(filterFlags(), sendFlags()...), outputFlag)...)
	a.does(cmd, func(v *values, args []string) func(context.Context) error {
		none(v, args)
		s, _ := v.filter(v.chooses())
		send := v.send()
		output := v.output()
		return func(ctx context.Context) error {
			store, err := a.open(ctx)
			if err != nil {
				return err
			}
			defer func() { _ = store.Close() }()
			now, err := store.Now(ctx)
			if err != nil {
				return err
			}
			s.Filter = toSend(s.Filter)
			plan, err := MakePlan(ctx, store, s.Resolve(now), PlanOptions{
				Known: a.known(send), Limit: send.limit, Rate: send.rate,
				OrderBy: send.OrderBy, PastBlocked: send.PastBlocked, OtherTarget: send.upstream != nil,
			})
			if err != nil {
				return err
			}
			return a.print(output, &plan, func(w io.Writer) error { return plan.WriteText(w, send.concurrency) })
		}
	})
	return cmd
}

// sending is what the flags say about how to send.
type sending struct {
	Options
	limit, concurrency int
	rate               float64
	fence              Fence
	upstream           *url.URL
	health             string
}

func (v *values) send() sending {
	s := sending{
		limit: v.whole("limit", 1, maxLimit), concurrency: v.whole("concurrency", 1, maxConcurrency),
		rate: v.rate(), upstream: v.upstream(), health: v.healthPath(),
	}
	s.Options = Options{
		Concurrency: s.concurrency, Rate: s.rate, Limit: s.limit,
		OrderBy: v.orderBy(), PastBlocked: v.yes("past-blocked"),
		MaxAttempts: v.whole("max-attempts", 1, maxAttempts), Wait: v.duration("wait"), PauseLimit: v.duration("pause-limit"),
	}
	s.Speed, s.MaxGap = v.speed(s.rate), v.duration("max-gap")
	s.Again, s.Ignore = v.yes("again"), v.paths()
	v.tests(&s)
	s.fence.Timeout = v.duration("fence-timeout")
	s.fence.Ignore, _ = v.list("ignore-ingress")
	return s
}

func (a *app) runCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "run [flags]", Short: "Send what matches, or go on with the run that was left unfinished"}
	addFlags(cmd, append(append(filterFlags(), sendFlags()...), outputFlag)...)
	a.does(cmd, func(v *values, args []string) func(context.Context) error {
		none(v, args)
		s, _ := v.filter(v.chooses())
		send := v.send()
		output := v.output()
		if text, _ := v.text("upstream"); text == "" && environment("HOLDFAST_UPSTREAM_URL") == "" && environment("HOLDFAST_ROUTES_FILE") == "" {
			v.problems = append(v.problems, "HOLDFAST_UPSTREAM_URL: is required; set it to the API, or set HOLDFAST_ROUTES_FILE, or give --upstream to send elsewhere")
		}
		return func(ctx context.Context) error {
			s.Filter = toSend(s.Filter)
			send.Selection = s
			return a.run(ctx, send, output)
		}
	})
	return cmd
}

func (a *app) run(ctx context.Context, send sending, output string) error {
	var guard *Guard
	if send.upstream != nil {
		var err error
		if guard, err = a.guard(ctx, send.upstream); err != nil {
			return err
		}
	}
	store, err := a.open(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()
	conn, err := stream.Connect(stream.ConnectOptions{
		URL: a.settings.NatsURL.Raw(), CredsFile: a.settings.NatsCredsFile, CAFile: a.settings.NatsCAFile,
		Name: "replayer", Logger: a.logger,
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		return fmt.Errorf("use jetstream: %w", err)
	}
	up, err := a.upstreams(send, guard)
	if err != nil {
		return err
	}
	defer up.Close()

	o := send.Options
	if send.upstream != nil {
		o.Target = send.upstream.String()
	}
	o.Ledger, o.Upstreams = store, up
	o.Owner = owner()
	o.Clock = SystemClock{}
	o.Logger = a.logger
	o.Progress = NewProgress(a.Stderr, a.logger, o.Clock)
	o.Stop = a.stop
	fence := send.fence
	fence.Ledger, fence.Completions, fence.Clock = store, JetStream{JS: js}, o.Clock
	o.Fence = &fence

	a.orderly.Store(true)
	report, err := Run(ctx, o)
	for err == nil && report.PickedUp && report.Newer && report.End == EndFinished && o.Limit == 0 {
		// The selection of a process that died was frozen long ago. This command
		// is about what matches now.
		a.logger.Info("the run that was left unfinished is finished, and a new one begins with what has come since", "run", report.Run)
		o.Progress = NewProgress(a.Stderr, a.logger, o.Clock)
		report, err = Run(ctx, o)
	}
	if err != nil {
		return err
	}
	if code, ok := a.interrupted(); ok && report.End == EndInterrupted {
		report.ExitCode = code
	}
	a.code = report.ExitCode
	return a.print(output, &report, report.WriteText)
}

// guardTimeout bounds the look-ups before a test replay.
const guardTimeout = 30 * time.Second

// guard gives what keeps a test replay away from the APIs of all routes, after it
// has let the target pass.
func (a *app) guard(ctx context.Context, target *url.URL) (*Guard, error) {
	var production []*url.URL
	if !a.settings.UpstreamURL.IsZero() {
		production = append(production, &a.settings.UpstreamURL.URL)
	}
	if a.table != nil {
		for _, r := range a.table.Routes() {
			production = append(production, r.Upstream)
		}
	}
	if len(production) == 0 {
		a.logger.Warn("neither HOLDFAST_UPSTREAM_URL nor HOLDFAST_ROUTES_FILE is set, so that nothing keeps this test replay away from the API")
	}
	guard, err := NewGuard(production, net.DefaultResolver, nil)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, guardTimeout)
	defer cancel()
	if err = guard.Check(ctx, target); errors.Is(err, ErrProduction) {
		err = &usageError{problems: []string{"--upstream: " + err.Error()}}
	}
	return guard, err
}

// upstreams gives the APIs of all routes, or the other system that was asked for.
// That one gets the requests as they were captured: a route's token is not for
// it.
func (a *app) upstreams(send sending, guard *Guard) (interface {
	Upstreams
	Close()
}, error) {
	if send.upstream != nil {
		o := UpstreamOptions{URL: send.upstream, CAFile: a.settings.UpstreamCAFile, MaxConns: send.concurrency, Health: send.health, Dial: guard.DialContext}
		if !a.settings.PreserveHost {
			o.Host = send.upstream.Host
		}
		return NewUpstream(o)
	}
	o := RoutesOptions{CAFile: a.settings.UpstreamCAFile, PreserveHost: a.settings.PreserveHost, MaxConns: send.concurrency, Health: send.health}
	if a.table != nil {
		o.Routes = a.table.Routes()
	} else {
		o.Routes = []*route.Route{{Name: capture.DefaultRoute, Upstream: &a.settings.UpstreamURL.URL, KeepAnswers: int(a.settings.KeepAnswers)}}
	}
	return NewRoutes(o)
}

// owner names this process among those that hold runs.
func owner() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return fmt.Sprintf("%s/%d/%s", host, os.Getpid(), rand.Text()[:8])
}

// print writes a result as JSON or as text.
func (a *app) print(output string, v any, text func(io.Writer) error) error {
	if output != "json" {
		return text(a.Stdout)
	}
	enc := json.NewEncoder(a.Stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// open opens the ledger. One that does not exist is an error: made anew it
// would say that nothing is left.
func (a *app) open(ctx context.Context) (ledger.Store, error) {
	raw := a.settings.LedgerURL.Raw()
	if path, ok := strings.CutPrefix(raw, "sqlite://"); ok {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("no ledger there: %w; set HOLDFAST_DATA_DIR or HOLDFAST_LEDGER_URL to that of the recorder", err)
		}
	}
	return open.Open(ctx, open.Options{URL: raw, Logger: a.logger})
}
