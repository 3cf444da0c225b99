package service

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The exit codes of Main. Second signals end with 128 and the signal's number.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// beyondStop is how much longer than SHUTDOWN_TIMEOUT Main waits before it
// leaves without a stop: for parts that do not heed their context, a second each.
const beyondStop = 5 * time.Second

// App is a binary, as Main runs it.
type App struct {
	Name    string // of the binary, for logs, help and metrics
	Summary string // what it does, in one line
	// Settings is a pointer to the settings' struct, which Main fills before
	// Build or a command is called.
	Settings Settings
	// Local gives the defaults of a process that is all of Holdfast.
	Local bool
	// Build makes the service: it adds components and clean-ups to the process
	// and returns. The ops listener serves already. The context is cancelled when
	// the process is to stop before Build has returned. After an error, what was
	// added is stopped and cleaned up.
	Build func(ctx context.Context, p *Process) error
	// Commands are what the binary can do besides serving.
	Commands []Command
}

// Command is something that a binary does once and then exits, for instance
// "recorder provision". It uses the binary's settings; there is no ops listener.
type Command struct {
	Name    string
	Summary string // what it does, in one line
	// Run does it. The context is cancelled by the first signal. Clean-ups that
	// it leaves on the process are called after it; components do not run.
	Run func(ctx context.Context, p *Process) error
}

// Process is what Main gives to Build or to a command.
type Process struct {
	// Logger carries the binary's name as service.
	Logger *slog.Logger
	// Registry is what /metrics shows.
	Registry *prometheus.Registry
	// Ready is what /readyz shows. Main itself adds the conditions start and stop.
	Ready *Readiness
	// OpsAddr is the bound address of the ops listener, nil in a command.
	OpsAddr net.Addr
	// Out is standard output, for the result of a command.
	Out io.Writer

	base  *slog.Logger
	group *Group
}

// LoggerFor gives a logger for a service that shares the process with others,
// with its name as service in place of the binary's.
func (p *Process) LoggerFor(name string) *slog.Logger { return p.base.With("service", name) }

// Add puts a component on the stack of the process; see Group.Add.
func (p *Process) Add(name string, c Component) { p.group.Add(name, c) }

// OnStop puts a clean-up on the stack of the process; see Group.OnStop.
func (p *Process) OnStop(name string, clean func(context.Context) error) { p.group.OnStop(name, clean) }

// Main is the whole of a main function but for os.Exit:
//
//	func main() { os.Exit(service.Main(app)) }
//
// It reads flags and settings, starts the ops listener, builds the service, runs
// it, and on SIGTERM or SIGINT stops it in order: not ready first, then last in
// first out, the ops listener last, all within SHUTDOWN_TIMEOUT. A second signal
// exits at once with 130 or 143. A component that fails takes the process down
// in the same order. It returns 0 after an ordered stop, 1 after a failure, 2 for
// wrong flags or settings.
func Main(app App) int {
	return app.main(os.Args[1:], os.Stdout, os.Stderr)
}

func (a App) main(args []string, stdout, stderr io.Writer) int {
	opts, err := a.parse(args)
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n\n", a.Name, err)
		a.writeUsage(stderr, nil)
		return exitUsage
	}
	switch {
	case opts.help:
		a.writeHelp(stdout, opts.command)
		return exitOK
	case opts.version:
		fmt.Fprintf(stdout, "%s %s %s\n", a.Name, Version(), runtime.Version())
		return exitOK
	}
	if err := Load(a.Settings, a.Local); err != nil {
		ReportSettings(stderr, a.Name, err)
		return exitUsage
	}
	if opts.check {
		fmt.Fprintln(stdout, "configuration is valid")
		return exitOK
	}

	tuneMemory()
	common := a.Settings.base()
	p := &Process{base: NewLogger(stderr, common.LogLevel, common.LogFormat), Ready: NewReadiness(), Out: stdout}
	p.Logger = p.LoggerFor(a.Name)
	p.group = NewGroup(p.Logger, common.ShutdownTimeout)
	p.Registry = NewRegistry(a.Name)
	work := func(ctx context.Context) int { return a.serve(ctx, p, common) }
	if opts.command != nil {
		work = func(ctx context.Context) int { return opts.command.run(ctx, p, common.ShutdownTimeout) }
	}
	return underSignals(p.Logger, common.ShutdownTimeout+beyondStop, work)
}

// underSignals calls work with a context that the first signal cancels. It
// returns work's exit code, or leaves it behind at the second signal, or when it
// has not returned in time after the first.
func underSignals(logger *slog.Logger, limit time.Duration, work func(context.Context) int) int {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	code := make(chan int, 1)
	go func() { code <- work(ctx) }()
	var late <-chan time.Time
	for {
		select {
		case c := <-code:
			return c
		case s := <-signals:
			if late != nil {
				logger.Warn("second signal, exiting at once", "signal", s.String())
				return 128 + int(s.(syscall.Signal))
			}
			logger.Info("stopping", "signal", s.String())
			cancel()
			timer := time.NewTimer(limit)
			defer timer.Stop()
			late = timer.C
		case <-late:
			logger.Error("did not stop in time, exiting")
			return exitFailed
		}
	}
}

// serve runs the service until ctx is done or something fails. The ops listener
// is one part and the service the other, so that the former outlives the latter.
func (a App) serve(ctx context.Context, p *Process, common *Common) int {
	start, stop := p.Ready.Flag("start", "starting"), p.Ready.Flag("stop", "")
	ops, err := NewOps(common.OpsAddr, p.Registry, p.Ready, p.Logger)
	if err != nil {
		p.Logger.Error("cannot start", "err", err)
		return exitFailed
	}
	p.OpsAddr = ops.Addr()

	var once sync.Once
	stopping := func(cause error) {
		once.Do(func() {
			stop.NotReady("stopping")
			if failed, ok := errors.AsType[*ComponentError](cause); ok {
				p.Logger.Error("a component failed", "component", failed.Component, "err", failed.Err)
			}
		})
	}
	p.group.onStop = stopping
	inner := &built{app: a, process: p, start: start, done: make(chan struct{})}
	inner.ctx, inner.cancel = context.WithCancel(context.Background())
	defer inner.cancel()
	outer := NewGroup(p.Logger, common.ShutdownTimeout)
	outer.onStop = stopping
	outer.Add("ops", ops)
	outer.Add(a.Name, inner)

	cause, stopErr := outer.run(ctx)
	if stopErr != nil {
		p.Logger.Error("the stop was not clean", "err", stopErr)
	}
	if cause != nil || stopErr != nil {
		return exitFailed
	}
	p.Logger.Info("stopped")
	return exitOK
}

// built is the service as a component: Build, then all that it added.
type built struct {
	app     App
	process *Process
	start   *Flag
	ctx     context.Context // for Build; cancelled by Stop
	cancel  context.CancelFunc
	once    sync.Once
	done    chan struct{} // closed when Build has returned, or never will be called
}

// Run builds and runs.
func (b *built) Run(ctx context.Context) error {
	called := false
	var err error
	b.once.Do(func() {
		called = true
		defer close(b.done)
		err = b.app.Build(b.ctx, b.process)
	})
	if !called {
		return nil // stopped before it ran
	}
	if err != nil {
		if b.ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return nil // asked to stop, and did
		}
		return fmt.Errorf("start: %w", err)
	}
	b.start.Ready()
	b.process.Logger.Info("started", "version", Version(), "ops_addr", b.process.OpsAddr.String())
	cause, stopErr := b.process.group.run(ctx)
	if stopErr != nil {
		b.process.Logger.Error("the stop was not clean", "err", stopErr)
	}
	return cause
}

// Stop has Build give up, waits for it, and stops what it has added.
func (b *built) Stop(ctx context.Context) error {
	b.cancel()
	go b.once.Do(func() { close(b.done) })
	select {
	case <-b.done:
	case <-ctx.Done():
		return fmt.Errorf("wait for the start to give up: %w", ctx.Err())
	}
	return b.process.group.Stop(ctx)
}

func (c *Command) run(ctx context.Context, p *Process, timeout time.Duration) int {
	err := c.Run(ctx, p)
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	if err = errors.Join(err, p.group.Stop(bounded)); err != nil {
		p.Logger.Error("the command failed", "command", c.Name, "err", err)
		return exitFailed
	}
	return exitOK
}

// options is what the arguments ask for.
type options struct {
	command              *Command
	help, version, check bool
}

func (a App) parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet(a.Name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.BoolVar(&o.help, "help", false, "")
	flags.BoolVar(&o.help, "h", false, "")
	flags.BoolVar(&o.version, "version", false, "")
	flags.BoolVar(&o.check, "check-config", false, "")
	for {
		if err := flags.Parse(args); err != nil {
			return o, err
		}
		args = flags.Args()
		if len(args) == 0 {
			return o, nil
		}
		if o.command != nil {
			return o, fmt.Errorf("unexpected argument %q", args[0])
		}
		for i := range a.Commands {
			if a.Commands[i].Name == args[0] {
				o.command = &a.Commands[i]
			}
		}
		if o.command == nil {
			return o, fmt.Errorf("unexpected argument %q", args[0])
		}
		args = args[1:]
	}
}

// writeUsage writes how the binary is called, or one command of it.
func (a App) writeUsage(w io.Writer, command *Command) {
	var text strings.Builder
	fmt.Fprintf(&text, "Usage:\n")
	if command == nil {
		fmt.Fprintf(&text, "  %s [flags]\n        %s\n", a.Name, a.Summary)
	}
	for i := range a.Commands {
		if command == nil || command == &a.Commands[i] {
			fmt.Fprintf(&text, "  %s %s [flags]\n        %s\n", a.Name, a.Commands[i].Name, a.Commands[i].Summary)
		}
	}
	text.WriteString(`
Flags:
  --check-config
        check the settings and exit: 0 when they are valid, 2 when not
  --help
        show this text and exit
  --version
        show the version and exit
`)
	// Standard output and error are all there is to report to.
	_, _ = io.WriteString(w, text.String())
}

func (a App) writeHelp(w io.Writer, command *Command) {
	a.writeUsage(w, command)
	fmt.Fprintf(w, "\nSettings, from the environment; an empty one counts as unset:\n")
	_ = WriteSettings(w, a.Settings, a.Local)
	fmt.Fprintf(w, "\nExit codes: 0 stopped in order, 1 failed, 2 wrong flags or settings, 130 or 143 after a second signal.\n")
}
