package exampleapi_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
)

func hash(body string) string {
	sum := sha256.Sum256([]byte(body))
	return hex.EncodeToString(sum[:])
}

func TestRequestsAreStoredAsTheyCame(t *testing.T) {
	db := filepath.Join(t.TempDir(), "example.db")
	api := start(t, exampleapi.Options{DB: db})
	c := client(t)
	for i, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		got, err := send(t, c, method, api.URL()+"/calls//a%2Fb?x=1&&y", "body\x00"+method, "X-Request-UUID", id(i+1))
		require.NoError(t, err)
		require.Equal(t, answered{201, fmt.Sprintf(`{"id":%q,"seq":%d}`+"\n", id(i+1), i+1)}, got)
	}
	got, err := send(t, c, "POST", api.URL()+"/empty", "", "X-Request-UUID", id(5), "X-Request-Attempt", "3", "X-Request-Replay", "run-7")
	require.NoError(t, err)
	require.Equal(t, 201, got.status)

	rows, err := exampleapi.ReadRows(t.Context(), db, 0, 100, true)
	require.NoError(t, err)
	require.Len(t, rows, 5)
	for i, method := range []string{"POST", "PUT", "PATCH", "DELETE"} {
		body := "body\x00" + method
		require.WithinDuration(t, time.Now(), rows[i].StoredAt, time.Minute)
		rows[i].StoredAt = time.Time{}
		require.Equal(t, exampleapi.Row{
			Seq: int64(i + 1), ID: id(i + 1), Attempt: 1, Method: method, Target: "/calls//a%2Fb?x=1&&y",
			Body: []byte(body), Bytes: int64(len(body)), SHA256: hash(body),
		}, rows[i])
	}
	require.Empty(t, rows[4].Body)
	require.Equal(t, 3, rows[4].Attempt)
	require.Equal(t, "run-7", rows[4].Replay)

	arrivals, err := exampleapi.ReadArrivals(exampleapi.ArrivalsFile(db), 0, 100)
	require.NoError(t, err)
	require.Len(t, arrivals, 5)
	require.WithinDuration(t, time.Now(), arrivals[4].At, time.Minute)
	arrivals[4].At = time.Time{}
	require.Equal(t, exampleapi.Arrival{Seq: 5, ID: id(5), Attempt: 3, Replay: "run-7", Method: "POST", Target: "/empty", SHA256: hash("")}, arrivals[4])
	for _, file := range []string{db, exampleapi.ArrivalsFile(db)} {
		require.FileExists(t, file)
	}
}

func TestARepeatedUUIDIsAnsweredAndReportedAgain(t *testing.T) {
	a := newAcker(t)
	api := start(t, exampleapi.Options{Report: a.URL, TokenFile: tokenFile(t)})
	c := client(t)
	first, err := send(t, c, "POST", api.URL()+"/calls", "one", "X-Request-UUID", id(1))
	require.NoError(t, err)
	other, err := send(t, c, "POST", api.URL()+"/calls", "two", "X-Request-UUID", id(2))
	require.NoError(t, err)
	again, err := send(t, c, "POST", api.URL()+"/calls", "one", "X-Request-UUID", id(1), "X-Request-Attempt", "2")
	require.NoError(t, err)
	require.Equal(t, 201, first.status)
	require.Equal(t, first, again)
	require.NotEqual(t, first, other)

	require.NoError(t, api.Stop(t.Context())) // delivers
	var got []string
	for _, e := range a.held() {
		got = append(got, fmt.Sprintf("%s %s %d", e.ID, e.Outcome, e.Attempt))
	}
	require.Equal(t, []string{id(1) + " processed 1", id(2) + " processed 1", id(1) + " processed 2"}, got)
}

func TestStatsCountRowsArrivalsAndRepeats(t *testing.T) {
	dir := t.TempDir()
	opts := exampleapi.Options{DB: filepath.Join(dir, "example.db"), FailFile: filepath.Join(dir, "broken")}
	api := start(t, opts)
	c := client(t)
	for _, n := range []int{1, 2, 1, 3, 1} {
		_, err := send(t, c, "POST", api.URL(), "x", "X-Request-UUID", id(n))
		require.NoError(t, err)
	}
	for range 2 { // not through Holdfast
		got, err := send(t, c, "POST", api.URL(), "x")
		require.NoError(t, err)
		require.Equal(t, 201, got.status)
	}
	require.NoError(t, os.WriteFile(opts.FailFile, nil, 0o600))
	got, err := send(t, c, "POST", api.URL(), "x", "X-Request-UUID", id(4))
	require.NoError(t, err)
	require.Equal(t, answered{500, `{"error":"broken by a release"}` + "\n"}, got)
	require.NoError(t, os.Remove(opts.FailFile))
	want := exampleapi.Stats{Rows: 5, Arrivals: 8, Repeats: 2}
	require.Equal(t, want, stats(t, api))

	// A restart goes on counting.
	require.NoError(t, api.Stop(t.Context()))
	api = start(t, opts)
	require.Equal(t, want, stats(t, api))
	_, err = send(t, c, "POST", api.URL(), "x", "X-Request-UUID", id(4), "X-Request-Attempt", "2")
	require.NoError(t, err)
	got, err = send(t, c, "GET", api.URL()+"/stats", "")
	require.NoError(t, err)
	require.Equal(t, answered{200, `{"rows":6,"arrivals":9,"repeats":3}` + "\n"}, got)
}

func TestFailuresOnRequest(t *testing.T) {
	for name, test := range map[string]struct {
		opts   exampleapi.Options
		header []string
		status int
	}{
		"rejected":        {exampleapi.Options{}, []string{"X-Example-Reject", "1"}, 422},
		"always":          {exampleapi.Options{FailRate: 1}, nil, 500},
		"other status":    {exampleapi.Options{FailRate: 1, FailStatus: 503}, nil, 503},
		"too large":       {exampleapi.Options{MaxBody: 3}, nil, 413},
		"kill not in use": {exampleapi.Options{}, []string{"X-Example-Kill", "1"}, 201},
		"delay":           {exampleapi.Options{Delay: time.Nanosecond}, nil, 201},
	} {
		t.Run(name, func(t *testing.T) {
			api := start(t, test.opts)
			got, err := send(t, client(t), "POST", api.URL(), "body", append(test.header, "X-Request-UUID", id(1))...)
			require.NoError(t, err)
			require.Equal(t, test.status, got.status)
			s := stats(t, api)
			require.EqualValues(t, 1, s.Arrivals)
			require.Equal(t, test.status == 201, s.Rows == 1)
		})
	}
}

func TestFailRateIsAShare(t *testing.T) {
	api := start(t, exampleapi.Options{FailRate: 0.5})
	c := client(t)
	seen := map[int]int{}
	for range 64 { // all alike once in 2^63 runs
		got, err := send(t, c, "POST", api.URL(), "")
		require.NoError(t, err)
		seen[got.status]++
	}
	require.Len(t, seen, 2)
	require.Equal(t, 64, seen[201]+seen[500])
}

// A delay ends when the client leaves: nothing is stored then.
func TestADelayEndsWithTheClient(t *testing.T) {
	api := start(t, exampleapi.Options{Delay: time.Hour})
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, api.URL(), nil)
	require.NoError(t, err)
	result := make(chan error, 1)
	c := client(t)
	go func() {
		resp, err := c.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		result <- err
	}()
	require.Eventually(t, func() bool { return stats(t, api).Arrivals == 1 }, 10*time.Second, time.Millisecond)
	cancel()
	require.ErrorIs(t, <-result, context.Canceled)
	require.NoError(t, api.Stop(t.Context())) // waits for the handler
}

func TestABodyThatBreaksOffIsAnArrivalButNoRow(t *testing.T) {
	db := filepath.Join(t.TempDir(), "example.db")
	api := start(t, exampleapi.Options{DB: db})
	conn, err := net.Dial("tcp", api.Addr())
	require.NoError(t, err)
	_, err = fmt.Fprintf(conn, "POST /calls HTTP/1.1\r\nHost: x\r\nX-Request-UUID: %s\r\nContent-Length: 10\r\n\r\nhalf", id(1))
	require.NoError(t, err)
	require.NoError(t, conn.(*net.TCPConn).CloseWrite())
	defer conn.Close()
	require.Eventually(t, func() bool { return stats(t, api).Arrivals == 1 }, 10*time.Second, time.Millisecond)
	arrivals, err := exampleapi.ReadArrivals(exampleapi.ArrivalsFile(db), 0, 10)
	require.NoError(t, err)
	require.True(t, arrivals[0].Incomplete)
	require.EqualValues(t, 4, arrivals[0].Bytes)
	require.Equal(t, hash("half"), arrivals[0].SHA256)
	require.NoError(t, api.Stop(t.Context()))
	rows, err := exampleapi.ReadRows(t.Context(), db, 0, 10, false)
	require.NoError(t, err)
	require.Empty(t, rows)
}

func TestDiscardedBodiesLeaveLengthAndHash(t *testing.T) {
	db := filepath.Join(t.TempDir(), "example.db")
	api := start(t, exampleapi.Options{DB: db, DiscardBodies: true})
	_, err := send(t, client(t), "POST", api.URL(), "body", "X-Request-UUID", id(1))
	require.NoError(t, err)
	rows, err := exampleapi.ReadRows(t.Context(), db, 0, 10, true)
	require.NoError(t, err)
	require.Len(t, rows, 1)
	require.Nil(t, rows[0].Body)
	require.EqualValues(t, 4, rows[0].Bytes)
	require.Equal(t, hash("body"), rows[0].SHA256)
}

// Many clients at once, each sending its request twice.
func TestConcurrentRepeatsMakeOneRowEach(t *testing.T) {
	db := filepath.Join(t.TempDir(), "example.db")
	api := start(t, exampleapi.Options{DB: db})
	c := client(t)
	const clients, each = 16, 20
	var all sync.WaitGroup
	seqs := make([]sync.Map, clients*each)
	for n := range 2 * clients {
		all.Go(func() {
			for i := range each {
				which := n/2*each + i
				got, err := send(t, c, "POST", api.URL(), fmt.Sprint(which), "X-Request-UUID", id(which+1))
				if err != nil || got.status != 201 {
					t.Errorf("%+v, %v", got, err)
					return
				}
				seqs[which].Store(got.body, nil)
			}
		})
	}
	all.Wait()
	for which := range seqs {
		answers := 0
		seqs[which].Range(func(any, any) bool { answers++; return true })
		require.Equal(t, 1, answers, "different answers for one UUID")
	}
	require.Equal(t, exampleapi.Stats{Rows: clients * each, Arrivals: 2 * clients * each, Repeats: clients * each}, stats(t, api))
	rows, err := exampleapi.ReadRows(t.Context(), db, 0, 2*clients*each, true)
	require.NoError(t, err)
	require.Len(t, rows, clients*each)
	for _, r := range rows {
		require.Equal(t, hash(string(r.Body)), r.SHA256)
		var which int
		_, err := fmt.Sscan(string(r.Body), &which)
		require.NoError(t, err)
		require.Equal(t, id(which+1), r.ID)
	}
}

func TestReading(t *testing.T) {
	api := start(t, exampleapi.Options{})
	c := client(t)
	for n := range 5 {
		_, err := send(t, c, "POST", api.URL()+"/stats", "x", "X-Request-UUID", id(n+1)) // any path can be posted to
		require.NoError(t, err)
	}
	for _, list := range []string{"/rows", "/arrivals"} {
		got, err := send(t, c, "GET", api.URL()+list+"?after=1&limit=3", "")
		require.NoError(t, err)
		require.Equal(t, 200, got.status)
		var items []struct {
			Seq int64
			ID  string
		}
		require.NoError(t, json.Unmarshal([]byte(got.body), &items))
		require.Len(t, items, 3)
		require.EqualValues(t, 2, items[0].Seq)
		require.Equal(t, id(4), items[2].ID)

		got, err = send(t, c, "GET", api.URL()+list+"?after=5", "")
		require.NoError(t, err)
		require.Equal(t, answered{200, "[]\n"}, got)
		for _, query := range []string{"?after=x", "?limit=0", "?limit=10001"} {
			got, err := send(t, c, "GET", api.URL()+list+query, "")
			require.NoError(t, err)
			require.Equal(t, 400, got.status, query)
		}
	}
	for target, status := range map[string]int{"/": 200, "/elsewhere": 404} {
		got, err := send(t, c, "GET", api.URL()+target, "")
		require.NoError(t, err)
		require.Equal(t, status, got.status, target)
	}
	got, err := send(t, c, "OPTIONS", api.URL(), "")
	require.NoError(t, err)
	require.Equal(t, 405, got.status)
	require.EqualValues(t, 5, stats(t, api).Arrivals)
}

func TestATornArrivalIsCutOff(t *testing.T) {
	db := filepath.Join(t.TempDir(), "example.db")
	file := exampleapi.ArrivalsFile(db)
	whole := `{"seq":1,"id":"` + id(1) + `"}` + "\n"
	require.NoError(t, os.WriteFile(file, []byte(whole+`{"seq":2,"id":"0189`), 0o600))
	arrivals, err := exampleapi.ReadArrivals(file, 0, 10)
	require.NoError(t, err)
	require.Len(t, arrivals, 1)
	api := start(t, exampleapi.Options{DB: db})
	_, err = send(t, client(t), "POST", api.URL(), "", "X-Request-UUID", id(1))
	require.NoError(t, err)
	require.Equal(t, exampleapi.Stats{Rows: 1, Arrivals: 2, Repeats: 1}, stats(t, api))
	arrivals, err = exampleapi.ReadArrivals(file, 0, 10)
	require.NoError(t, err)
	require.Len(t, arrivals, 2)

	require.NoError(t, os.WriteFile(file, []byte("not JSON\n"+whole), 0o600))
	_, err = exampleapi.ReadArrivals(file, 0, 10)
	require.Error(t, err)
	_, err = exampleapi.New(exampleapi.Options{DB: db, Addr: "127.0.0.1:0"})
	require.ErrorContains(t, err, "open arrivals")
}

func TestNewNamesAllProblems(t *testing.T) {
	_, err := exampleapi.New(exampleapi.Options{FailRate: 2, FailStatus: 200, MaxBody: -1, Delay: -1, CrashBody: "x", DiscardBodies: true})
	require.Error(t, err)
	for _, name := range []string{"DB", "FailRate", "FailStatus", "MaxBody", "Delay", "Die", "CrashBody"} {
		require.ErrorContains(t, err, name)
	}
	for name, opts := range map[string]exampleapi.Options{
		"no directory": {DB: filepath.Join(t.TempDir(), "none", "x.db")},
		"no address":   {Addr: "256.0.0.1:0"},
		"no token":     {Report: "http://127.0.0.1:1", TokenFile: filepath.Join(t.TempDir(), "none")},
	} {
		if opts.DB == "" {
			opts.DB = filepath.Join(t.TempDir(), "x.db")
		}
		_, err := exampleapi.New(opts)
		require.Error(t, err, name)
	}
}

func TestStopBeforeRunAndTwice(t *testing.T) {
	api, err := exampleapi.New(exampleapi.Options{DB: filepath.Join(t.TempDir(), "x.db"), Addr: "127.0.0.1:0"})
	require.NoError(t, err)
	require.NoError(t, api.Stop(t.Context()))
	require.NoError(t, api.Stop(t.Context()))
	require.NoError(t, api.Run(t.Context()))
}

func TestRunEndsWithItsContext(t *testing.T) {
	a := newAcker(t)
	api, err := exampleapi.New(exampleapi.Options{
		DB: filepath.Join(t.TempDir(), "x.db"), Addr: "127.0.0.1:0", Report: a.URL, TokenFile: tokenFile(t),
	})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- api.Run(ctx) }()
	_, err = send(t, client(t), "POST", api.URL(), "", "X-Request-UUID", id(1))
	require.NoError(t, err)
	cancel()
	require.NoError(t, <-ran)
	require.Len(t, a.held(), 1)
	_, err = send(t, client(t), "POST", api.URL(), "")
	require.Error(t, err)
	require.True(t, strings.Contains(err.Error(), "refused"), err)
}

func BenchmarkStore(b *testing.B) {
	api, err := exampleapi.New(exampleapi.Options{DB: filepath.Join(b.TempDir(), "x.db"), Addr: "127.0.0.1:0"})
	require.NoError(b, err)
	ran := make(chan error, 1)
	go func() { ran <- api.Run(context.Background()) }()
	tr := &http.Transport{MaxIdleConnsPerHost: 64}
	c := &http.Client{Transport: tr}
	body := strings.Repeat("x", 1024)
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			resp, err := c.Post(api.URL()+"/calls", "text/plain", strings.NewReader(body))
			if err != nil {
				b.Error(err)
				return
			}
			_, err = io.Copy(io.Discard, resp.Body) // keeps the connection
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusCreated {
				b.Errorf("%d, %v", resp.StatusCode, err)
			}
		}
	})
	tr.CloseIdleConnections()
	require.NoError(b, api.Stop(context.Background()))
	require.NoError(b, <-ran)
}
