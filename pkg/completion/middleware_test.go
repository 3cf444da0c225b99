package completion_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-io/holdfast/pkg/completion"
)

// serve runs a handler behind the middleware and returns what was reported of
// one request to it. A request without id carries no X-Request-UUID.
func serve(t *testing.T, header map[string]string, handler http.HandlerFunc) (*http.Response, []completion.Event) {
	t.Helper()
	a := newAcker(t)
	c, _ := newClient(t, a, nil)
	api := httptest.NewUnstartedServer(completion.Middleware(c)(handler))
	api.Config.ErrorLog = log.New(t.Output(), "", 0)
	api.Start()
	defer api.Close()
	req, err := http.NewRequest(http.MethodPost, api.URL, strings.NewReader("body"))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range header {
		req.Header.Set(name, value)
	}
	resp, err := api.Client().Do(req)
	if err == nil {
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Log(err)
		}
	}
	api.Close() // the handler has returned, and with it the middleware
	closeNow(t, c)
	return resp, a.held()
}

func TestMiddlewareReportsByStatus(t *testing.T) {
	withID := map[string]string{"X-Request-UUID": id(1)}
	done := []completion.Event{processed(1)}
	failed := func(detail string) []completion.Event {
		return []completion.Event{{ID: id(1), Outcome: completion.Failed, Attempt: 1, Detail: detail}}
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	for name, test := range map[string]struct {
		header  map[string]string
		handler http.HandlerFunc
		want    []completion.Event
	}{
		"nothing written":  {withID, func(http.ResponseWriter, *http.Request) {}, done},
		"body only":        {withID, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }, done},
		"201":              {withID, status(201), done},
		"303":              {withID, status(303), done},
		"400":              {withID, status(400), nil},
		"401":              {withID, status(401), nil},
		"429":              {withID, status(429), nil},
		"500":              {withID, status(500), failed("answered 500")},
		"503":              {withID, status(503), failed("answered 503")},
		"early hints":      {withID, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(103); w.WriteHeader(500) }, failed("answered 500")},
		"first one counts": {withID, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200); w.WriteHeader(500) }, done},
		"flushed":          {withID, func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush(); w.WriteHeader(500) }, done},
		"panic":            {withID, func(http.ResponseWriter, *http.Request) { panic("broken") }, failed("the handler panicked")},
		"panic after 200":  {withID, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200); panic(http.ErrAbortHandler) }, failed("the handler panicked")},
		"no header":        {nil, status(200), nil},
		"not a UUID":       {map[string]string{"X-Request-UUID": "mine"}, status(200), nil},
		"odd attempt":      {map[string]string{"X-Request-UUID": id(1), "X-Request-Attempt": "many"}, status(200), done},
		"attempt": {
			map[string]string{"X-Request-UUID": id(1), "X-Request-Attempt": "7"}, status(200),
			[]completion.Event{{ID: id(1), Outcome: completion.Processed, Attempt: 7}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, got := serve(t, test.header, test.handler)
			equal(t, got, test.want)
		})
	}
}

func TestMiddlewarePassesThePanicOn(t *testing.T) {
	a := newAcker(t)
	c, _ := newClient(t, a, nil)
	broken := errors.New("broken")
	handler := completion.Middleware(c)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(broken) }))
	req := httptest.NewRequest(http.MethodPost, "/", nil)
	req.Header.Set("X-Request-UUID", id(1))
	func() {
		defer func() {
			if v := recover(); v != broken {
				t.Errorf("recovered %v", v)
			}
		}()
		handler.ServeHTTP(httptest.NewRecorder(), req)
	}()
	closeNow(t, c)
	if got := a.held(); len(got) != 1 || got[0].Outcome != completion.Failed {
		t.Fatalf("got %v", got)
	}
}

func TestContextKnowsTheRequest(t *testing.T) {
	header := map[string]string{"X-Request-UUID": id(1), "X-Request-Attempt": "2", "X-Request-Replay": "run-1"}
	serve(t, header, func(_ http.ResponseWriter, r *http.Request) {
		got, ok := completion.FromContext(r.Context())
		if want := (completion.Request{ID: id(1), Attempt: 2, Replay: "run-1"}); !ok || got != want {
			t.Errorf("got %+v, %v", got, ok)
		}
	})
	serve(t, nil, func(_ http.ResponseWriter, r *http.Request) {
		if got, ok := completion.FromContext(r.Context()); ok {
			t.Errorf("got %+v", got)
		}
		if got, ok := completion.Hold(r.Context()); ok {
			t.Errorf("held %+v", got)
		}
	})
}

func TestHeldRequestsAreLeftToTheHandler(t *testing.T) {
	header := map[string]string{"X-Request-UUID": id(1), "X-Request-Attempt": "2"}
	var held completion.Request
	hold := func(r *http.Request) {
		var ok bool
		if held, ok = completion.Hold(r.Context()); !ok {
			t.Error("not held")
		}
	}
	_, got := serve(t, header, func(w http.ResponseWriter, r *http.Request) {
		hold(r)
		w.WriteHeader(202)
	})
	equal(t, got, nil)
	want := completion.Event{ID: id(1), Outcome: completion.Failed, Attempt: 2, Detail: "no stock"}
	if e := held.Event(completion.Failed, "no stock"); e != want {
		t.Fatalf("got %+v", e)
	}
	_, got = serve(t, header, func(_ http.ResponseWriter, r *http.Request) {
		hold(r)
		panic("broken")
	})
	equal(t, got, nil)
}

func TestMiddlewareKeepsTheWriterWhole(t *testing.T) {
	withID := map[string]string{"X-Request-UUID": id(1)}
	t.Run("hijack", func(t *testing.T) {
		_, got := serve(t, withID, func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			conn.Close()
		})
		equal(t, got, nil)
	})
	t.Run("controller", func(t *testing.T) {
		serve(t, withID, func(w http.ResponseWriter, _ *http.Request) {
			rc := http.NewResponseController(w)
			for name, err := range map[string]error{
				"SetReadDeadline":  rc.SetReadDeadline(time.Now().Add(time.Minute)),
				"SetWriteDeadline": rc.SetWriteDeadline(time.Now().Add(time.Minute)),
				"EnableFullDuplex": rc.EnableFullDuplex(),
				"Flush":            rc.Flush(),
			} {
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	})
	t.Run("copy", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, make([]byte, 100_000), 0o600); err != nil {
			t.Fatal(err)
		}
		resp, got := serve(t, withID, func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) })
		if resp.ContentLength != 100_000 {
			t.Errorf("got %d bytes", resp.ContentLength)
		}
		equal(t, got, []completion.Event{processed(1)})
	})
}

// A stream reaches the client while the handler is still writing.
func TestMiddlewareStreams(t *testing.T) {
	a := newAcker(t)
	c, _ := newClient(t, a, nil)
	next := make(chan struct{})
	api := httptest.NewServer(completion.Middleware(c)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "one\n")
		w.(http.Flusher).Flush()
		<-next
		_, _ = io.WriteString(w, "two\n")
	})))
	defer api.Close()
	req, err := http.NewRequest(http.MethodPost, api.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Request-UUID", id(1))
	resp, err := api.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	if line, err := lines.ReadString('\n'); err != nil || line != "one\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	if got := a.held(); len(got) != 0 {
		t.Fatalf("reported before its end: %v", got)
	}
	close(next)
	if line, err := lines.ReadString('\n'); err != nil || line != "two\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	api.Close()
	closeNow(t, c)
	equal(t, a.held(), []completion.Event{processed(1)})
}

// The answer does not depend on the acker: with a full queue it is the same,
// and the loss of the confirmation is announced.
func TestMiddlewareAnnouncesAFullQueue(t *testing.T) {
	a := newAcker(t)
	hang(t, a)
	c, d := newClient(t, a, func(o *completion.Options) { o.MaxQueue, o.MaxBatch = 1, 1 })
	report(t, c, 101, 101)
	a.wait(t, "a delivery that hangs", func() bool { return len(a.posts) == 1 })
	report(t, c, 102, 102)
	req := httptest.NewRequest(http.MethodPost, "/", nil)
	req.Header.Set("X-Request-UUID", id(1))
	rec := httptest.NewRecorder()
	completion.Middleware(c)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(201) })).ServeHTTP(rec, req)
	if rec.Code != 201 || !errors.Is(d.of(1), completion.ErrQueueFull) {
		t.Fatalf("answered %d, dropped %v", rec.Code, d.of(1))
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Close(ctx); !errors.Is(err, completion.ErrClosed) {
		t.Fatalf("got %v", err)
	}
}
