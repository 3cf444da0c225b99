package chaos_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/history"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// What is killed in one run, and when: by the progress of the load.
const (
	warmUp  = 200 // before the first kill
	leastUp = 80  // from one kill to the next
	mostUp  = 400
	mostOff = 400 // from a kill to the new start
	clients = 8
	// failedWeight is how many failed requests are worth one good: failing is
	// quicker, and a process needs time to do anything that is worth a kill.
	failedWeight = 5
)

// progress is how far a load is.
func progress(l *history.Load) int {
	ended, failed := l.Count()
	return ended - failed + failed/failedWeight
}

// step is one thing that is done to one victim.
type step struct {
	at     int // progress of the load
	victim string
	kill   bool // else start
}

// schedule kills each victim twice, and four of them once more; at last it kills
// the ingress while the broker is away, so that answered requests are in the
// spool alone. The same seed gives the same schedule.
func schedule(rng *rand.Rand, victims []string) []step {
	var order []string
	for _, v := range victims {
		order = append(order, v, v)
	}
	for range 4 {
		order = append(order, victims[rng.IntN(len(victims))])
	}
	rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	var steps []step
	at := warmUp
	free := map[string]int{} // when a victim is up again
	for _, v := range order {
		at += leastUp + rng.IntN(mostUp-leastUp)
		begin := max(at, free[v]+1)
		end := begin + 1 + rng.IntN(mostOff)
		free[v] = end
		steps = append(steps, step{begin, v, true}, step{end, v, false})
	}
	if slices.Contains(victims, harness.NATS) {
		for _, end := range free {
			at = max(at, end+1)
		}
		steps = append(steps, step{at + 60, harness.NATS, true}, step{at + 120, harness.Ingress, true},
			step{at + 125, harness.Ingress, false}, step{at + 130, harness.NATS, false})
	}
	slices.SortStableFunc(steps, func(a, b step) int { return a.at - b.at })
	return steps
}

// TestKillEveryProcess kills every process again and again under load, replayers
// included, over both topologies and both ways to report completion.
func TestKillEveryProcess(t *testing.T) {
	t.Parallel()
	for _, s := range setups {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			seeds(t, func(t *testing.T, seed uint64) { killEveryProcess(t, s, seed) })
		})
	}
}

func killEveryProcess(t *testing.T, s setup, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0))
	w := newWorld(t, s)
	w.start()
	load := &history.Load{
		URL: w.IngressURL() + "/v1/calls", Clients: clients, Pause: 5 * time.Millisecond,
		Size: 300, LargeEvery: 40, LargeSize: 900 << 10, Seed: seed,
	}
	load.Start()
	defer load.Stop()

	var replaying *proc.Process
	replays, kills := 0, 0
	// again starts a replayer where none runs: one that has nothing to do ends.
	// Each has a filter of its own: it does not wait for the lease of a run whose
	// replayer was killed.
	again := func() {
		if replaying == nil || !replaying.Running() {
			replays++
			replaying = w.launchReplayer(fmt.Sprintf("replayer-%d", replays),
				"--wait", "5s", "--fence-timeout", "5s", "--since", fmt.Sprintf("%dh", replays))
		}
	}
	again()
	replayerOff := false
	for _, step := range schedule(rng, append(w.victims(), replayer)) {
		await(t, load, step.at)
		switch {
		case step.victim == replayer && step.kill:
			replaying.Kill()
			replayerOff = true
		case step.victim == replayer:
			replayerOff = false
		case step.kill:
			w.kill(step.victim)
		default:
			w.revive(step.victim)
		}
		if step.kill {
			kills++
		}
		if !replayerOff {
			again()
		}
	}
	last := progress(load)
	w.heal()
	await(t, load, last+100) // all is well again, and stays so
	load.Stop()
	if replaying.Running() {
		_, err := replaying.Stop(patience)
		require.NoError(t, err)
	}
	w.settle()
	w.replayAll()
	v := w.judge(load.Sent())
	t.Logf("seed %d, %s: %d kills, %d replayers\n%s", seed, s, kills, replays, v)
	require.NotZero(t, v.Replayed, "nothing was replayed: the kills proved nothing")
	require.NotZero(t, v.Unknown, "no client lost its connection: the kills proved nothing")
	w.Close()
	w.api.Kill()
}

// await waits until the load is so far.
func await(t *testing.T, load *history.Load, at int) {
	t.Helper()
	require.Eventually(t, func() bool { return progress(load) >= at }, patience, time.Millisecond, "the load comes to %d", at)
}
