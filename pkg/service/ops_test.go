package service

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// serving runs a server until the test ends.
func serving(t *testing.T, s *Server) {
	t.Helper()
	ran := make(chan error, 1)
	go func() { ran <- s.Run(context.Background()) }()
	t.Cleanup(func() {
		require.NoError(t, s.Stop(context.Background()))
		require.NoError(t, <-ran)
	})
}

func TestOpsEndpoints(t *testing.T) {
	ready := NewReadiness()
	var full atomic.Bool
	ready.Check("spool", func() error {
		if full.Load() {
			return errors.New("the spool is full")
		}
		return nil
	})
	flag := ready.Flag("start", "starting")
	ops, err := NewOps("127.0.0.1:0", NewRegistry("ingress"), ready, quiet())
	require.NoError(t, err)
	full.Store(true)
	serving(t, ops)

	code, body := get(t, ops.URL()+"/livez")
	require.Equal(t, http.StatusOK, code, "alive, whatever readiness says")
	require.Equal(t, "ok\n", body)

	code, body = get(t, ops.URL()+"/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.JSONEq(t, `{"ready":false,"failing":[{"name":"spool","reason":"the spool is full"},{"name":"start","reason":"starting"}]}`, body)
	full.Store(false)
	flag.Ready()
	code, body = get(t, ops.URL()+"/readyz")
	require.Equal(t, http.StatusOK, code)
	require.JSONEq(t, `{"ready":true,"failing":[]}`, body)
	flag.NotReady("draining")
	code, _ = get(t, ops.URL()+"/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)

	code, body = get(t, ops.URL()+"/metrics")
	require.Equal(t, http.StatusOK, code)
	require.Regexp(t, `(?m)^holdfast_build_info\{go_version="go1[^"]+",service="ingress",version="[^"]+"\} 1$`, body)
	require.Contains(t, body, "go_goroutines ")
	require.Contains(t, body, "process_open_fds ")

	code, _ = get(t, ops.URL()+"/nothing")
	require.Equal(t, http.StatusNotFound, code)
}

func TestPprofOnLoopbackOnly(t *testing.T) {
	for addr, want := range map[Addr]int{"127.0.0.1:0": http.StatusOK, ":0": http.StatusNotFound, "0.0.0.0:0": http.StatusNotFound} {
		ops, err := NewOps(addr, NewRegistry("x"), NewReadiness(), quiet())
		require.NoError(t, err)
		serving(t, ops)
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/goroutine?debug=1"} {
			code, _ := get(t, ops.URL()+path)
			require.Equal(t, want, code, "%s%s", addr, path)
		}
	}
}

func TestServerStop(t *testing.T) {
	t.Run("before Run frees the port", func(t *testing.T) {
		s, err := Listen("api", "127.0.0.1:0", http.NotFoundHandler(), quiet())
		require.NoError(t, err)
		require.NoError(t, s.Stop(waiting(t)))
		l, err := net.Listen("tcp", s.Addr().String())
		require.NoError(t, err)
		require.NoError(t, l.Close())
		require.NoError(t, s.Stop(waiting(t)), "twice")
		require.NoError(t, s.Run(waiting(t)))
	})
	t.Run("waits for the requests under way", func(t *testing.T) {
		entered, letGo := make(chan struct{}), make(chan struct{})
		s, err := Listen("api", "127.0.0.1:0", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			close(entered)
			<-letGo
			_, _ = io.WriteString(w, "whole")
		}), quiet())
		require.NoError(t, err)
		ran := make(chan error, 1)
		go func() { ran <- s.Run(context.Background()) }()
		answered := make(chan string, 1)
		go func() {
			_, body := get(t, s.URL())
			answered <- body
		}()
		<-entered
		over, cancel := context.WithCancel(context.Background())
		stopped := make(chan error, 1)
		go func() { stopped <- s.Stop(over) }()
		require.NoError(t, <-ran, "it accepts no more")
		select {
		case err := <-stopped:
			t.Fatalf("Stop returned %v with a request under way", err)
		default:
		}
		close(letGo)
		require.Equal(t, "whole", <-answered)
		require.NoError(t, <-stopped)
		cancel()
	})
	t.Run("closes what is left when its time is up", func(t *testing.T) {
		entered, gone := make(chan struct{}), make(chan struct{})
		s, err := Listen("api", "127.0.0.1:0", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(entered)
			<-r.Context().Done()
			close(gone)
		}), quiet())
		require.NoError(t, err)
		ran := make(chan error, 1)
		go func() { ran <- s.Run(context.Background()) }()
		failed := make(chan error, 1)
		go func() {
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			_, err := client.Get(s.URL())
			failed <- err
		}()
		<-entered
		over, cancel := context.WithCancel(context.Background())
		cancel()
		require.ErrorIs(t, s.Stop(over), context.Canceled)
		require.Error(t, <-failed)
		<-gone
		require.NoError(t, <-ran)
	})
	t.Run("by context", func(t *testing.T) {
		s, err := Listen("api", "127.0.0.1:0", http.NotFoundHandler(), quiet())
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(waiting(t))
		ran := make(chan error, 1)
		go func() { ran <- s.Run(ctx) }()
		cancel()
		require.NoError(t, <-ran)
		require.NoError(t, s.Stop(waiting(t)))
	})
}

func TestServerSpeaksTLS(t *testing.T) {
	known := httptest.NewTLSServer(nil)
	defer known.Close()
	s, err := Listen("api", "127.0.0.1:0", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Proto) }), quiet())
	require.NoError(t, err)
	s.TLS = &tls.Config{Certificates: known.TLS.Certificates}
	serving(t, s)
	require.True(t, strings.HasPrefix(s.URL(), "https://"))
	client := known.Client()
	defer client.CloseIdleConnections()
	client.Transport.(*http.Transport).ForceAttemptHTTP2 = true
	r, err := client.Get(s.URL())
	require.NoError(t, err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	require.Equal(t, "HTTP/2.0", string(body))
}

func TestServersHaveBounds(t *testing.T) {
	s := NewHTTPServer(http.NotFoundHandler(), quiet())
	require.Positive(t, s.ReadHeaderTimeout)
	require.Positive(t, s.ReadTimeout)
	require.Positive(t, s.WriteTimeout)
	require.Positive(t, s.IdleTimeout)
	require.Positive(t, s.MaxHeaderBytes)
	require.NotNil(t, s.ErrorLog)
}

func TestWriteProblem(t *testing.T) {
	item := 3
	w := httptest.NewRecorder()
	w.Header().Set("Proxy-Status", "holdfast; error=x")
	w.Header().Set("Content-Encoding", "gzip")
	WriteProblem(w, Problem{Status: http.StatusBadRequest, Detail: `"x" is no number`, Parameter: "limit", Item: &item, RetryAfter: 1500e6})
	require.Equal(t, http.StatusBadRequest, w.Code)
	require.Equal(t, "application/problem+json", w.Header().Get("Content-Type"))
	require.Equal(t, "2", w.Header().Get("Retry-After"))
	require.Equal(t, "holdfast; error=x", w.Header().Get("Proxy-Status"))
	require.Empty(t, w.Header().Get("Content-Encoding"))
	require.JSONEq(t, `{"type":"about:blank","title":"Bad Request","status":400,"detail":"\"x\" is no number","parameter":"limit","item":3}`, w.Body.String())

	w = httptest.NewRecorder()
	WriteProblem(w, Problem{})
	require.Equal(t, http.StatusInternalServerError, w.Code)
	require.JSONEq(t, `{"type":"about:blank","title":"Internal Server Error","status":500}`, w.Body.String())
	require.Empty(t, w.Header().Values("Retry-After"))
}

func TestProblemMux(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/requests/{id}", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.PathValue("id")) })
	h := ProblemMux(mux)
	ask := func(method, path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w
	}
	require.Equal(t, "7", ask("GET", "/v1/requests/7").Body.String())
	for path, want := range map[[2]string]int{{"GET", "/v2"}: http.StatusNotFound, {"POST", "/v1/requests/7"}: http.StatusMethodNotAllowed} {
		w := ask(path[0], path[1])
		require.Equal(t, want, w.Code)
		var p Problem
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &p))
		require.Equal(t, want, p.Status)
		require.Equal(t, "application/problem+json", w.Header().Get("Content-Type"))
	}
	require.Equal(t, "GET, HEAD", ask("POST", "/v1/requests/7").Header().Get("Allow"))
}

func TestRequireToken(t *testing.T) {
	var logs bytes.Buffer
	file := filepath.Join(t.TempDir(), "token")
	replace := func(text string) {
		// As a secret volume does it: the name comes to mean another file.
		require.NoError(t, os.WriteFile(file+".new", []byte(text), 0o600))
		require.NoError(t, os.Rename(file+".new", file))
	}
	replace("first-token\n")
	guard, err := RequireToken(file, slog.New(slog.NewTextHandler(&logs, nil)))
	require.NoError(t, err)
	h := guard(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	ask := func(authorization ...string) *httptest.ResponseRecorder {
		w, r := httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)
		r.Header["Authorization"] = authorization
		h.ServeHTTP(w, r)
		return w
	}

	require.Equal(t, http.StatusNoContent, ask("Bearer first-token").Code)
	require.Equal(t, http.StatusNoContent, ask("bearer first-token").Code)
	for _, wrong := range [][]string{
		nil, {""}, {"first-token"}, {"Basic first-token"}, {"Bearer"}, {"Bearer "}, {"Bearer first-toke"}, {"Bearer first-tokenn"},
		{"Bearer FIRST-TOKEN"}, {"Bearer first-token", "Bearer first-token"},
	} {
		w := ask(wrong...)
		require.Equal(t, http.StatusUnauthorized, w.Code, wrong)
		require.Contains(t, w.Header().Get("WWW-Authenticate"), `Bearer realm="holdfast"`)
		require.Equal(t, "application/problem+json", w.Header().Get("Content-Type"))
	}
	require.NotContains(t, ask().Header().Get("WWW-Authenticate"), "error=")
	require.Contains(t, ask("Bearer x").Header().Get("WWW-Authenticate"), `error="invalid_token"`)

	replace("second-token")
	require.Equal(t, http.StatusUnauthorized, ask("Bearer first-token").Code, "the old token is revoked at once")
	require.Equal(t, http.StatusNoContent, ask("Bearer second-token").Code)

	require.NoError(t, os.Remove(file))
	logs.Reset()
	require.Equal(t, http.StatusNoContent, ask("Bearer second-token").Code, "the last token stays in force")
	require.Equal(t, http.StatusUnauthorized, ask("Bearer first-token").Code)
	require.Equal(t, 1, strings.Count(logs.String(), "level=ERROR"), "logged once, not at each request")
	replace("two words")
	require.Equal(t, http.StatusNoContent, ask("Bearer second-token").Code)
	require.Equal(t, http.StatusUnauthorized, ask("Bearer two words").Code)
	replace("third-token")
	require.Equal(t, http.StatusNoContent, ask("Bearer third-token").Code)
	require.NotRegexp(t, "(first|second|third)-token", logs.String(), "no token is ever logged")
}

func TestRequireTokenAtStart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	_, err := RequireToken(file, quiet())
	require.ErrorIs(t, err, os.ErrNotExist)
	for _, text := range []string{"", "\n", "two words", "two\nlines", strings.Repeat("x", maxTokenFile+1)} {
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		_, err = RequireToken(file, quiet())
		require.ErrorIs(t, err, ErrNoToken)
	}
	guard, err := RequireToken("", quiet())
	require.NoError(t, err)
	w := httptest.NewRecorder()
	guard(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	require.Equal(t, http.StatusNoContent, w.Code)
}

func TestLogger(t *testing.T) {
	var out bytes.Buffer
	logger := NewLogger(&out, "warn", "")
	logger.Info("hidden")
	ErrorLog(logger, "http server").Print("tls: bad record\n")
	var line map[string]any
	require.NoError(t, json.Unmarshal(out.Bytes(), &line), "JSON where there is no terminal")
	require.Equal(t, "http server", line["msg"])
	require.Equal(t, "tls: bad record", line["err"])
	require.Equal(t, "WARN", line["level"])

	out.Reset()
	NewLogger(&out, "debug", "text").Debug("shown")
	require.Contains(t, out.String(), "level=DEBUG msg=shown")

	out.Reset()
	p := &Process{base: NewLogger(&out, "info", "json")}
	p.LoggerFor("acker").Info("x")
	require.Equal(t, 1, strings.Count(out.String(), `"service"`))
	require.Contains(t, out.String(), `"service":"acker"`)
}

func TestBuiltVersion(t *testing.T) {
	require.NotEmpty(t, Version())
	require.Equal(t, "v1.2.3", builtVersion(&debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}))
	require.Equal(t, "devel", builtVersion(&debug.BuildInfo{}))
	require.Equal(t, "devel-0123456789ab-dirty", builtVersion(&debug.BuildInfo{
		Main:     debug.Module{Version: "(devel)"},
		Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.modified", Value: "true"}},
	}))
}
