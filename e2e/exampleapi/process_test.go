package exampleapi_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
)

// wasKilled waits for the process and checks that it died of kill -9.
func wasKilled(t *testing.T, p *process) {
	t.Helper()
	require.Error(t, p.Wait())
	status := p.ProcessState.Sys().(syscall.WaitStatus)
	require.True(t, status.Signaled(), "%v", p.ProcessState)
	require.Equal(t, syscall.SIGKILL, status.Signal())
}

// The API is killed when it has committed and not yet answered or reported. The
// request comes again with the same UUID: one row, and it is reported.
func TestKilledBetweenCommitAndAnswer(t *testing.T) {
	a := newAcker(t)
	dir := t.TempDir()
	db := filepath.Join(dir, "example.db")
	bin, c := build(t), client(t)
	args := []string{"-db", db, "-report", a.URL, "-token-file", tokenFile(t), "-crash-after-commit", filepath.Join(dir, "marker")}

	p := launch(t, bin, nil, args...)
	_, err := send(t, c, "POST", p.url+"/calls", "a call", "X-Request-UUID", id(1))
	require.Error(t, err, "it was answered")
	wasKilled(t, p)
	require.FileExists(t, filepath.Join(dir, "marker"))
	require.Empty(t, a.held())
	before, err := exampleapi.ReadRows(t.Context(), db, 0, 10, true)
	require.NoError(t, err)
	require.Len(t, before, 1, "it had not committed")

	p = launch(t, bin, nil, args...)
	got, err := send(t, c, "POST", p.url+"/calls", "a call", "X-Request-UUID", id(1), "X-Request-Attempt", "2", "X-Request-Replay", "run-1")
	require.NoError(t, err)
	require.Equal(t, answered{201, fmt.Sprintf(`{"id":%q,"seq":%d}`+"\n", id(1), before[0].Seq)}, got)
	require.NoError(t, p.Process.Signal(syscall.SIGTERM))
	require.NoError(t, p.Wait(), p.err.String())

	after, err := exampleapi.ReadRows(t.Context(), db, 0, 10, true)
	require.NoError(t, err)
	require.Equal(t, before, after)
	events := a.held()
	require.Len(t, events, 1)
	require.Equal(t, id(1), events[0].ID.String())
	require.EqualValues(t, "processed", events[0].Outcome)
	require.Equal(t, 2, events[0].Attempt)
	arrivals, err := exampleapi.ReadArrivals(exampleapi.ArrivalsFile(db), 0, 10)
	require.NoError(t, err)
	require.Len(t, arrivals, 2)
	require.Equal(t, "run-1", arrivals[1].Replay)
}

func TestKillerRequests(t *testing.T) {
	bin, c := build(t), client(t)
	for name, test := range map[string]struct {
		args, header []string
		body         string
	}{
		"header": {nil, []string{"X-Example-Kill", "1"}, "x"},
		"body":   {[]string{"-crash-body", "poison"}, nil, "some poison here"},
	} {
		t.Run(name, func(t *testing.T) {
			db := filepath.Join(t.TempDir(), "example.db")
			p := launch(t, bin, []string{"EXAMPLE_DB=" + db}, test.args...)
			got, err := send(t, c, "POST", p.url, "harmless", "X-Request-UUID", id(1), "X-Example-Kill", "0")
			require.NoError(t, err)
			require.Equal(t, 201, got.status)
			_, err = send(t, c, "POST", p.url, test.body, append(test.header, "X-Request-UUID", id(2))...)
			require.Error(t, err)
			wasKilled(t, p)
			arrivals, err := exampleapi.ReadArrivals(exampleapi.ArrivalsFile(db), 0, 10)
			require.NoError(t, err)
			require.Len(t, arrivals, 2, "the killer's arrival is recorded")
			rows, err := exampleapi.ReadRows(t.Context(), db, 0, 10, false)
			require.NoError(t, err)
			require.Len(t, rows, 1)
		})
	}
}

func TestFlagsAndEnvironment(t *testing.T) {
	bin, c := build(t), client(t)
	db := filepath.Join(t.TempDir(), "example.db")
	p := launch(t, bin, []string{"EXAMPLE_FAIL_RATE=1", "EXAMPLE_FAIL_STATUS=503", "EXAMPLE_DB=ignored.db"}, "-db", db, "-fail-status", "502")
	got, err := send(t, c, "POST", p.url, "", "X-Request-UUID", id(1))
	require.NoError(t, err)
	require.Equal(t, 502, got.status)
	got, err = send(t, c, "GET", p.url+"/stats", "")
	require.NoError(t, err)
	var s exampleapi.Stats
	require.NoError(t, json.Unmarshal([]byte(got.body), &s))
	require.Equal(t, exampleapi.Stats{Arrivals: 1}, s)
	require.NoError(t, p.Process.Signal(syscall.SIGTERM))
	require.NoError(t, p.Wait(), p.err.String())

	for want, args := range map[string][]string{
		"EXAMPLE_DELAY":     {"-h"},
		"not defined":       {"-typo"},
		"unknown arguments": {"more"},
		"FailRate":          {"-fail-rate", "7"},
	} {
		out, err := run(t, bin, args...)
		require.Equal(t, want == "EXAMPLE_DELAY", err == nil, "%v", args)
		require.Contains(t, out, want)
		require.False(t, strings.Contains(out, "panic"), out)
	}
}
