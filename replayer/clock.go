package replayer

import (
	"context"
	"time"
)

// Clock is the time by which a run paces itself. Leases are not decided by it,
// but by the ledger's clock and this process's monotonic one.
type Clock interface {
	Now() time.Time
	// Sleep returns after d, or the cause when ctx ends before.
	Sleep(ctx context.Context, d time.Duration) error
}

// SystemClock is the machine's clock.
type SystemClock struct{}

// Now is the time of the machine.
func (SystemClock) Now() time.Time { return time.Now() }

// Sleep waits in real time.
func (SystemClock) Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
