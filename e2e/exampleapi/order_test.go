package exampleapi_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// replayed makes a request as a replay sends it.
func replayed(t *testing.T, url string, n int, key string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, url, body)
	require.NoError(t, err)
	req.Header.Set("X-Request-UUID", id(n))
	req.Header.Set("X-Request-Replay", "run-1")
	req.Header.Set(exampleapi.HeaderKey, key)
	return req
}

// The API itself records which key a request has, and what of it was worked on
// when the request came.
func TestKeysAreRecorded(t *testing.T) {
	db := filepath.Join(t.TempDir(), "api.db")
	api := start(t, exampleapi.Options{DB: db})
	c := client(t)
	do := func(req *http.Request) {
		resp, err := c.Do(req)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, http.StatusCreated, resp.StatusCode)
	}
	for n, key := range []string{"a", "a", "b"} {
		do(replayed(t, api.URL(), n, key, strings.NewReader("x")))
	}
	order, err := exampleapi.ReplayOrder(exampleapi.ArrivalsFile(db))
	require.NoError(t, err)
	require.Equal(t, exampleapi.Order{Keys: 2, Arrivals: 3}, order)
	require.True(t, order.Kept())

	// The first of c is worked on until its body has come, in which time the
	// second comes and goes: its number is higher, and the first is recorded later.
	read, write := io.Pipe()
	first := make(chan struct{})
	go func() {
		defer close(first)
		resp, err := c.Do(replayed(t, api.URL(), 3, "c", read))
		if err == nil {
			_ = resp.Body.Close()
		}
	}()
	_, err = write.Write([]byte("x"))
	require.NoError(t, err)
	n := 4
	for ; len(order.Broken) == 0; n++ { // until the API has begun with the first
		require.Less(t, n, 10_000)
		do(replayed(t, api.URL(), n, "c", strings.NewReader("x")))
		order, err = exampleapi.ReplayOrder(exampleapi.ArrivalsFile(db))
		require.NoError(t, err)
	}
	require.Contains(t, order.Broken[0], "while 1 others of key \"c\" were worked on")
	require.NoError(t, write.Close())
	<-first
	order, err = exampleapi.ReplayOrder(exampleapi.ArrivalsFile(db))
	require.NoError(t, err)
	require.Contains(t, order.Broken[len(order.Broken)-1], id(3)+" came after "+id(n-1))
	require.False(t, order.Kept())
}

func TestReplayOrderJudgesReplaysAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "arrivals")
	file, err := os.Create(path)
	require.NoError(t, err)
	for i, a := range []exampleapi.Arrival{
		{ID: id(2), Key: "a"}, {ID: id(1), Key: "a"}, // live
		{ID: id(9), Replay: "r"}, {ID: id(8), Replay: "r"}, // without a key
		{ID: id(1), Key: "a", Replay: "r"}, {ID: id(1), Key: "a", Replay: "r"}, {ID: id(2), Key: "a", Replay: "r"}, // again
	} {
		a.Seq = int64(i + 1)
		require.NoError(t, json.NewEncoder(file).Encode(a))
	}
	require.NoError(t, file.Close())
	order, err := exampleapi.ReplayOrder(path)
	require.NoError(t, err)
	require.Equal(t, exampleapi.Order{Keys: 1, Arrivals: 3}, order)
	require.True(t, order.Kept())
	require.False(t, exampleapi.Order{}.Kept(), "there was nothing to keep")
}

func TestAKeeperStartsItAgain(t *testing.T) {
	dir := t.TempDir()
	addr, err := proc.FreeAddr()
	require.NoError(t, err)
	k := exampleapi.NewKeeper(filepath.Dir(build(t)), dir, addr, "-crash-body", "poison")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	require.NoError(t, k.Start(ctx))
	defer k.Kill()
	c := client(t)
	for crashes := 1; crashes <= 2; crashes++ {
		_, err = send(t, c, http.MethodPost, k.URL(), "poison", "X-Request-UUID", id(crashes))
		require.Error(t, err)
		require.Eventually(t, func() bool {
			got, err := send(t, c, http.MethodGet, k.URL()+"/", "")
			return err == nil && got.status == http.StatusOK
		}, 20*time.Second, 10*time.Millisecond)
		require.Equal(t, crashes, k.Crashes())
	}
	k.Kill()
	_, err = send(t, c, http.MethodGet, k.URL()+"/", "")
	require.ErrorContains(t, err, "refused")
	k.Kill()
	require.Equal(t, 2, k.Crashes(), "what its owner kills is no crash")
	require.NoError(t, k.Start(ctx))
	arrivals, err := exampleapi.ReadArrivals(exampleapi.ArrivalsFile(k.DB()), 0, 10)
	require.NoError(t, err)
	require.Len(t, arrivals, 2)
}
