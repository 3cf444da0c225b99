package chaos_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/history"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

const (
	rollingRequests = 3000
	rollingRuns     = 3 // replayers that run at once
	rollingInFlight = 8
	rollingKills    = 6
)

// TestKillReplayers kills replayers at random moments while several of them
// send thousands of requests, by several runs with the same filter and others.
// Nothing is sent again after its result was written, and in the end all of them
// are processed.
func TestKillReplayers(t *testing.T) {
	t.Parallel()
	seeds(t, killReplayers)
}

func killReplayers(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, setup{topology: harness.Distributed})
	broken := filepath.Join(w.dir, "broken")
	w.args = []string{"-fail-file", broken, "-delay", "20ms"}
	require.NoError(t, os.WriteFile(broken, nil, 0o600))
	w.start()
	load := &history.Load{URL: w.IngressURL() + "/v1/calls", Clients: clients, Requests: rollingRequests, Size: 300, Seed: seed}
	load.Start()
	load.Wait()
	sent := load.Sent()
	for _, s := range sent {
		require.Equal(t, http.StatusInternalServerError, s.Status, "%+v", s)
		require.True(t, s.Answered(), "%+v", s)
	}
	w.settle()
	require.NoError(t, os.Remove(broken))

	running := make([]*proc.Process, rollingRuns)
	started := 0
	launch := func(i int) {
		started++
		args := []string{"--wait", "60s", "--concurrency", strconv.Itoa(rollingInFlight)}
		if i == 0 {
			args = append(args, "--method", "POST") // a run of its own
		}
		running[i] = w.launchReplayer(fmt.Sprintf("replayer-%d", started), args...)
	}
	for i := range running {
		launch(i)
	}
	// Each kill comes after so many more arrivals.
	arrived := len(sent)
	for range rollingKills {
		arrived += 40 + rng.IntN(rollingRequests/rollingKills/2)
		w.awaitArrivals(arrived)
		i := rng.IntN(len(running))
		require.True(t, running[i].Running(), "replayer %d has ended: %s", i, running[i].Tail(2<<10))
		running[i].Kill()
		launch(i)
	}
	deadline := patienceOver(t)
	for _, p := range running {
		select {
		case <-p.Ended():
		case <-deadline:
			require.Fail(t, "a replayer does not end", p.Tail(2<<10))
		}
	}
	w.replayAll()
	v := w.judge(sent)
	t.Logf("seed %d: %d replayers killed, %d requests arrived %d times\n%s", seed, rollingKills, len(sent), len(w.arrivals()), v)
	require.Equal(t, rollingRequests, v.Replayed)
	// What arrived once more than it had to was in flight when its replayer died.
	again := len(w.arrivals()) - 2*rollingRequests
	require.LessOrEqual(t, again, rollingKills*rollingInFlight, "more came again than can have been in flight")
	require.NotZero(t, again, "nothing was in flight when replayers were killed: the kills proved nothing")
	w.Close()
	w.api.Kill()
}
