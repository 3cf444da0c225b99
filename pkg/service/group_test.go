package service

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// events records what happened, in order.
type events struct {
	mu   sync.Mutex
	list []string
}

func (e *events) add(what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, what)
}

func (e *events) all() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]string{}, e.list...)
}

// recorded is a component that writes down its stop and its end.
type recorded struct {
	name    string
	events  *events
	started chan struct{}
	quit    chan struct{}
	once    sync.Once

	fail    chan error // what is sent is what Run returns
	stopErr error
	deaf    bool // does not heed Stop
}

func newRecorded(name string, e *events) *recorded {
	return &recorded{name: name, events: e, started: make(chan struct{}), quit: make(chan struct{}), fail: make(chan error, 1)}
}

func (r *recorded) Run(ctx context.Context) error {
	close(r.started)
	defer r.events.add(r.name + " ended")
	select {
	case <-r.quit:
		return nil
	case <-ctx.Done():
		select {
		case <-r.quit: // both, and select took the other
			return nil
		default:
		}
		r.events.add(r.name + " cancelled")
		return ctx.Err()
	case err := <-r.fail:
		return err
	}
}

func (r *recorded) Stop(context.Context) error {
	r.events.add(r.name + " stop")
	if !r.deaf {
		r.once.Do(func() { close(r.quit) })
	}
	return r.stopErr
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// waiting bounds every wait for something that a bug could keep from happening.
func waiting(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// stack is a group of two components and two clean-ups.
func stack(e *events) (*Group, *recorded, *recorded) {
	g := NewGroup(quiet(), 30*time.Second)
	first, second := newRecorded("first", e), newRecorded("second", e)
	clean := func(name string) func(context.Context) error {
		return func(context.Context) error { e.add(name); return nil }
	}
	g.OnStop("bottom", clean("bottom"))
	g.Add("first", first)
	g.OnStop("between", clean("between"))
	g.Add("second", second)
	return g, first, second
}

var inOrder = []string{"second stop", "second ended", "between", "first stop", "first ended", "bottom"}

func TestGroupStopsLastInFirstOut(t *testing.T) {
	for name, stop := range map[string]func(*Group, context.CancelFunc) error{
		"by context": func(_ *Group, cancel context.CancelFunc) error { cancel(); return nil },
		"by Stop":    func(g *Group, _ context.CancelFunc) error { return g.Stop(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			e := &events{}
			g, first, second := stack(e)
			ctx, cancel := context.WithCancel(waiting(t))
			defer cancel()
			ran := make(chan error, 1)
			go func() { ran <- g.Run(ctx) }()
			<-first.started
			<-second.started
			require.NoError(t, stop(g, cancel))
			require.NoError(t, <-ran)
			require.Equal(t, inOrder, e.all())

			require.NoError(t, g.Stop(waiting(t)), "twice")
			require.Equal(t, inOrder, e.all(), "nothing is stopped twice")
		})
	}
}

func TestGroupConcurrentStops(t *testing.T) {
	e := &events{}
	g, first, second := stack(e)
	ran := make(chan error, 1)
	go func() { ran <- g.Run(waiting(t)) }()
	<-first.started
	<-second.started
	var stops sync.WaitGroup
	for range 8 {
		stops.Go(func() {
			if err := g.Stop(waiting(t)); err != nil {
				t.Error(err)
			}
			if got := e.all(); len(got) != len(inOrder) {
				t.Errorf("Stop returned when only this had happened: %v", got)
			}
		})
	}
	stops.Wait()
	require.NoError(t, <-ran)
	require.Equal(t, inOrder, e.all())
}

func TestGroupStopBeforeRun(t *testing.T) {
	e := &events{}
	g, _, _ := stack(e)
	require.NoError(t, g.Stop(waiting(t)))
	require.Equal(t, []string{"second stop", "between", "first stop", "bottom"}, e.all())
	require.NoError(t, g.Run(waiting(t)))
	require.NotContains(t, e.all(), "first ended", "Run after Stop runs nothing")
	require.Panics(t, func() { g.OnStop("late", nil) })
}

func TestGroupComponentFails(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct{ err, want error }{
		"with an error": {broken, broken},
		"by ending":     {nil, ErrEnded},
	} {
		t.Run(name, func(t *testing.T) {
			e := &events{}
			g, first, second := stack(e)
			ran := make(chan error, 1)
			go func() { ran <- g.Run(waiting(t)) }()
			<-first.started
			<-second.started
			first.fail <- c.err
			err := <-ran
			require.ErrorIs(t, err, c.want)
			failed, ok := errors.AsType[*ComponentError](err)
			require.True(t, ok)
			require.Equal(t, "first", failed.Component)
			got := e.all()
			require.Equal(t, "first ended", got[0])
			require.Equal(t, []string{"second stop", "second ended", "between", "first stop", "bottom"}, got[1:])
		})
	}
}

func TestGroupStopErrorsAreNamed(t *testing.T) {
	e := &events{}
	g, first, second := stack(e)
	second.stopErr = errors.New("half a batch is left")
	ran := make(chan error, 1)
	go func() { ran <- g.Run(waiting(t)) }()
	<-first.started
	<-second.started
	require.EqualError(t, g.Stop(waiting(t)), "second: half a batch is left")
	require.NoError(t, <-ran, "the errors of a stop belong to who asked for it")
	require.Equal(t, inOrder, e.all(), "an error stops nothing short")
}

func TestGroupCancelsWhatOverlooksStop(t *testing.T) {
	e := &events{}
	g, first, second := stack(e)
	second.deaf = true
	ran := make(chan error, 1)
	go func() { ran <- g.Run(waiting(t)) }()
	<-first.started
	<-second.started
	require.NoError(t, g.Stop(waiting(t)))
	require.NoError(t, <-ran)
	require.Equal(t, []string{"second stop", "second cancelled", "second ended", "between", "first stop", "first ended", "bottom"}, e.all())
}

// stuck heeds neither Stop nor its context until it is let go.
type stuck struct{ letGo chan struct{} }

func (s stuck) Run(context.Context) error  { <-s.letGo; return nil }
func (s stuck) Stop(context.Context) error { <-s.letGo; return nil }

func TestGroupLeavesBehindWhatIsStuck(t *testing.T) {
	e := &events{}
	g := NewGroup(quiet(), 30*time.Second)
	g.lastWait = 0
	s := stuck{letGo: make(chan struct{})}
	g.OnStop("bottom", func(ctx context.Context) error { e.add("bottom"); return nil })
	g.Add("stuck", s)
	ran := make(chan error, 1)
	go func() { ran <- g.Run(waiting(t)) }()
	over, cancel := context.WithCancel(context.Background())
	cancel()
	err := g.Stop(over)
	require.ErrorIs(t, err, ErrNotStopped)
	require.ErrorContains(t, err, "stuck: ")
	require.NoError(t, <-ran)
	close(s.letGo)
}

func TestGroupsNest(t *testing.T) {
	e := &events{}
	inner, first, second := stack(e)
	outer := NewGroup(quiet(), 30*time.Second)
	outer.OnStop("ground", func(context.Context) error { e.add("ground"); return nil })
	outer.Add("inner", inner)
	ran := make(chan error, 1)
	go func() { ran <- outer.Run(waiting(t)) }()
	<-first.started
	<-second.started
	broken := errors.New("broken")
	second.fail <- broken
	err := <-ran
	require.ErrorIs(t, err, broken)
	require.EqualError(t, err, "inner: second: broken")
	require.Equal(t, []string{"second ended", "second stop", "between", "first stop", "first ended", "bottom", "ground"}, e.all())
}
