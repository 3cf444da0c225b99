package service

import (
	"context"
	"sync"
)

// Loop makes a Component of a function that works until its context is done:
// Stop ends that context and waits for the function to return.
type Loop struct {
	run  func(context.Context) error
	quit chan struct{}
	once sync.Once

	mu    sync.Mutex
	ended chan struct{} // nil until Run
}

// NewLoop makes one. The function returns nil when its context has ended it.
func NewLoop(run func(context.Context) error) *Loop {
	return &Loop{run: run, quit: make(chan struct{})}
}

// Run calls the function, at most once.
func (l *Loop) Run(ctx context.Context) error {
	l.mu.Lock()
	select {
	case <-l.quit:
		l.mu.Unlock()
		return nil
	default:
	}
	ended := make(chan struct{})
	l.ended = ended
	l.mu.Unlock()
	defer close(ended)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-l.quit:
			cancel()
		case <-ctx.Done():
		}
	}()
	return l.run(ctx)
}

// Stop ends the function's context and waits until it has returned, or ctx is
// done.
func (l *Loop) Stop(ctx context.Context) error {
	l.once.Do(func() { close(l.quit) })
	l.mu.Lock()
	ended := l.ended
	l.mu.Unlock()
	if ended == nil {
		return nil
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
