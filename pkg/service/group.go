package service

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

// Component is a part of a process with a life of its own.
type Component interface {
	// Run works until Stop is called or ctx is done, and returns nil then.
	// An error, or a return that nobody asked for, is a failure. In a group, ctx
	// is done as soon as Stop has returned: what has nothing to finish may heed
	// ctx alone and have a Stop that does nothing.
	Run(ctx context.Context) error
	// Stop takes no new work, finishes what has begun, and returns when that is
	// done or ctx is. It may be called before Run, which then returns nil at
	// once, during it, after it, more than once, and concurrently.
	Stop(ctx context.Context) error
}

// lastWait is how long a part is still waited for once the time for a stop is
// up: what closing files takes when there is nothing to wait for.
const lastWait = time.Second

// Group runs components together and stops them in order. It is a Component
// itself, so that groups nest.
//
// Components and clean-ups form one stack: what was added last is stopped first,
// and the next only when it has ended. The stack is the same after a failure,
// after a stop, and when Run was never called.
type Group struct {
	logger   *slog.Logger
	timeout  time.Duration
	lastWait time.Duration
	onStop   func(cause error) // called once, when stopping begins; may be nil

	mu       sync.Mutex
	parts    []*part
	running  bool
	stopping chan struct{} // closed when stopping begins
	stopped  chan struct{} // closed when it has ended
	cause    error         // why it began, nil when somebody asked; set before stopping is closed
	failed   *part         // the part whose end is the cause
	stopErr  error         // set before stopped is closed
}

// part is a component, or a clean-up when run is nil.
type part struct {
	name   string
	run    func(context.Context) error
	stop   func(context.Context) error
	cancel context.CancelFunc // nil until it runs
	ended  chan struct{}
	err    error // of run; set before ended is closed
}

// NewGroup makes an empty group. The timeout bounds the stop that follows a
// failure or the end of Run's context; Stop is bounded by its own.
func NewGroup(logger *slog.Logger, timeout time.Duration) *Group {
	return &Group{
		logger: logger, timeout: timeout, lastWait: lastWait,
		stopping: make(chan struct{}), stopped: make(chan struct{}),
	}
}

// Add puts a component on the stack. The name is for logs and errors. Adding
// after Run or Stop is a fault of the program, and panics.
func (g *Group) Add(name string, c Component) {
	g.push(&part{name: name, run: c.Run, stop: c.Stop, ended: make(chan struct{})})
}

// OnStop puts a clean-up on the stack, for what was opened and must be closed
// when all that was added after it has ended. It is called once, also when Run
// never was. Adding after Run or Stop is a fault of the program, and panics.
func (g *Group) OnStop(name string, clean func(context.Context) error) {
	g.push(&part{name: name, stop: clean})
}

func (g *Group) push(p *part) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.running || g.begun() {
		panic("service: " + p.name + " was added to a group that runs or has stopped")
	}
	g.parts = append(g.parts, p)
}

// begun says whether stopping has begun.
func (g *Group) begun() bool {
	select {
	case <-g.stopping:
		return true
	default:
		return false
	}
}

// Run runs all components at once, and blocks until ctx is done, Stop is called,
// or a component ends. It then stops the whole stack, and returns once that has
// ended. The components' own contexts are not cancelled before their turn.
//
// The error joins a *ComponentError for the component that failed first and
// those met while stopping; the latter belong to Stop when it was called. A group
// runs once.
func (g *Group) Run(ctx context.Context) error {
	return errors.Join(g.run(ctx))
}

// run is Run with the two kinds of error apart.
func (g *Group) run(ctx context.Context) (cause, stopErr error) {
	g.mu.Lock()
	if g.begun() {
		g.mu.Unlock()
		return nil, nil
	}
	if g.running {
		g.mu.Unlock()
		return errors.New("the group already runs"), nil
	}
	g.running = true
	ended := make(chan *part, len(g.parts))
	for _, p := range g.parts {
		if p.run == nil {
			continue
		}
		var own context.Context
		own, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
		go func() {
			p.err = p.run(own)
			close(p.ended)
			ended <- p
		}()
	}
	g.mu.Unlock()

	var failed *part
	select {
	case <-ctx.Done():
	case <-g.stopping:
	case failed = <-ended:
	}
	if !g.begin(failed) {
		<-g.stopped
		return nil, nil
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.timeout)
	defer cancel()
	g.stopAll(bounded)
	return g.cause, g.stopErr
}

// Stop stops the whole stack, and returns the errors met. When stopping has
// begun elsewhere it waits for its end, or for ctx. It takes no longer than ctx
// allows and a second for each part that does not heed it; such a part is left
// behind and reported as ErrNotStopped.
func (g *Group) Stop(ctx context.Context) error {
	if g.begin(nil) {
		g.stopAll(ctx)
		return g.stopErr
	}
	select {
	case <-g.stopped:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// begin lets exactly one caller do the stopping.
func (g *Group) begin(failed *part) bool {
	g.mu.Lock()
	if g.begun() {
		g.mu.Unlock()
		return false
	}
	if failed != nil {
		err := failed.err
		if err == nil {
			err = ErrEnded
		}
		g.failed, g.cause = failed, &ComponentError{Component: failed.name, Err: err}
	}
	close(g.stopping)
	g.mu.Unlock()
	if g.onStop != nil {
		g.onStop(g.cause)
	}
	return true
}

func (g *Group) stopAll(ctx context.Context) {
	defer close(g.stopped)
	var errs []error
	for i := len(g.parts) - 1; i >= 0; i-- {
		p := g.parts[i]
		g.logger.Debug("stopping a component", "component", p.name)
		for _, err := range g.stopPart(ctx, p) {
			errs = append(errs, &ComponentError{Component: p.name, Err: err})
		}
	}
	g.stopErr = errors.Join(errs...)
}

func (g *Group) stopPart(ctx context.Context, p *part) (errs []error) {
	var stopErr error
	done := make(chan struct{})
	go func() {
		defer close(done)
		stopErr = p.stop(ctx)
	}()
	switch {
	case !g.await(ctx, done):
		errs = append(errs, ErrNotStopped)
	case stopErr != nil:
		errs = append(errs, stopErr)
	}
	if p.cancel == nil {
		return errs
	}
	// Whoever overlooked Stop may still heed its context.
	p.cancel()
	switch {
	case !g.await(ctx, p.ended):
		if len(errs) == 0 {
			errs = append(errs, ErrNotStopped)
		}
	case p != g.failed && p.err != nil && !errors.Is(p.err, context.Canceled):
		errs = append(errs, p.err)
	}
	return errs
}

// await waits for done as long as ctx allows, and a little longer.
func (g *Group) await(ctx context.Context, done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	case <-ctx.Done():
	}
	last := time.NewTimer(g.lastWait)
	defer last.Stop()
	select {
	case <-done:
		return true
	case <-last.C:
		return false
	}
}
