package exampleapi

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"github.com/holdfast-io/holdfast/e2e/proc"
)

// restartAfter is how long a [Keeper] waits before it starts the API again, as
// supervisors do: an API that cannot start must not take the machine.
const restartAfter = 100 * time.Millisecond

// Keeper runs the example API in a process of its own, and starts it again when
// it dies, as a supervisor would. Its methods may be called concurrently, but
// for Start and Kill, which are the owner's.
type Keeper struct {
	spec proc.Spec
	addr string

	mu      sync.Mutex
	process *proc.Process
	crashes int
	down    chan struct{} // closed when the API is to stay down; nil while it is
	keeping sync.WaitGroup
}

// NewKeeper makes a keeper of the command bin/exampleapi, to listen on addr,
// with its database, its arrivals and its log in dir, and further arguments. It
// starts nothing.
func NewKeeper(bin, dir, addr string, args ...string) *Keeper {
	db := filepath.Join(dir, "api.db")
	return &Keeper{addr: addr, spec: proc.Spec{
		Name: "exampleapi", Path: filepath.Join(bin, "exampleapi"), Dir: dir,
		Args: append([]string{"-addr", addr, "-db", db}, args...),
	}}
}

// DB is the path of the API's database.
func (k *Keeper) DB() string { return k.spec.Args[3] }

// URL is the base address of the API.
func (k *Keeper) URL() string { return "http://" + k.addr }

// Start starts the API, waits until it answers, and keeps it running from then
// on.
func (k *Keeper) Start(ctx context.Context) error {
	p, err := proc.Start(k.spec)
	if err != nil {
		return err
	}
	if err := proc.AwaitHTTP(ctx, p, k.URL()+"/stats"); err != nil {
		p.Kill()
		return err
	}
	down := make(chan struct{})
	k.mu.Lock()
	k.process, k.down = p, down
	k.mu.Unlock()
	k.keeping.Go(func() { k.keep(p, down) })
	return nil
}

// keep starts the API again each time that it ends, until it is to stay down.
func (k *Keeper) keep(p *proc.Process, down chan struct{}) {
	for {
		select {
		case <-p.Ended():
		case <-down:
			p.Kill()
			return
		}
		k.mu.Lock()
		k.crashes++
		k.mu.Unlock()
		timer := time.NewTimer(restartAfter)
		select {
		case <-timer.C:
		case <-down:
			timer.Stop()
			return
		}
		next, err := proc.Start(k.spec)
		if err != nil {
			return // it stays away, which whoever needs it will notice
		}
		p = next
		k.mu.Lock()
		k.process = p
		k.mu.Unlock()
	}
}

// Crashes is how often the API has died by itself.
func (k *Keeper) Crashes() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.crashes
}

// Kill kills the API (SIGKILL); it stays down until Start. Without one that
// runs it does nothing.
func (k *Keeper) Kill() {
	k.mu.Lock()
	down := k.down
	k.down = nil
	k.mu.Unlock()
	if down != nil {
		close(down)
	}
	k.keeping.Wait()
}
