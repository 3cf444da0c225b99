package exampleapi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/holdfast-io/holdfast/pkg/completion"
)

// Request headers that make the API misbehave for one request.
const (
	// HeaderReject: 1 makes the API answer 422.
	HeaderReject = "X-Example-Reject"
	// HeaderKill: 1 kills the API where [Options.CrashOnHeader] allows it.
	HeaderKill = "X-Example-Kill"
)

// HeaderKey names whose requests are to keep their order. The API does nothing
// about it but record it: see [Arrival].
const HeaderKey = "X-Client-Id"

// Options says how the API behaves. Only DB is required.
type Options struct {
	Addr string // to listen on, 127.0.0.1:9000 by default; port 0 takes a free one
	DB   string // path of the SQLite database; [ArrivalsFile] lies beside it

	// Report is the base address of the acker that is told of every processed
	// request. Without it the API reports by its answers alone.
	Report    string
	TokenFile string // of the acker

	// MaxBody is the greatest body in bytes, 64 MiB by default; above it the API
	// answers 413.
	MaxBody int64
	// DiscardBodies stores length and hash of bodies only, and holds none of
	// them in memory.
	DiscardBodies bool

	FailRate   float64       // the share of requests that fail, from 0 to 1
	FailFile   string        // while this file exists all requests fail
	FailStatus int           // what failed requests are answered, 500 by default
	Delay      time.Duration // before a request is acted upon

	// Die ends the process at once, as kill -9 does. The crash options need it.
	Die func()
	// CrashOnHeader dies on a request with [HeaderKill], after recording its
	// arrival.
	CrashOnHeader bool
	// CrashBody does so on a request whose body contains this text.
	CrashBody string
	// CrashAfterCommit is the path of a marker. While it does not exist, the next
	// request that has been committed makes the marker and dies before its
	// answer. So it happens once, whatever restarts the API.
	CrashAfterCommit string

	Logger *slog.Logger // [slog.Default] by default
}

// Stats is what the API saw and stored, over all its restarts.
type Stats struct {
	Rows     int64 `json:"rows"`
	Arrivals int64 `json:"arrivals"`
	Repeats  int64 `json:"repeats"` // arrivals with a UUID that had arrived before
	// Completions are those of this start; nil when none are reported.
	Completions *completion.Stats `json:"completions,omitempty"`
}

// API is a running example API. Its methods may be called concurrently.
type API struct {
	opts     Options
	listener net.Listener
	server   *http.Server
	store    *store
	journal  *journal
	client   *completion.Client // nil when nothing is reported

	stopOnce sync.Once
	stopErr  error
	stopped  chan struct{} // closed when Stop is done
}

// New checks the options, opens the database and listens. The caller must
// [API.Stop] it.
func New(opts Options) (_ *API, err error) {
	if opts.Addr == "" {
		opts.Addr = "127.0.0.1:9000"
	}
	if opts.MaxBody == 0 {
		opts.MaxBody = 64 << 20
	}
	if opts.FailStatus == 0 {
		opts.FailStatus = http.StatusInternalServerError
	}
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	var errs []error
	if opts.DB == "" {
		errs = append(errs, errors.New("no DB"))
	}
	if opts.FailRate < 0 || opts.FailRate > 1 {
		errs = append(errs, fmt.Errorf("FailRate: %v is not from 0 to 1", opts.FailRate))
	}
	if opts.FailStatus < 400 || opts.FailStatus > 599 {
		errs = append(errs, fmt.Errorf("FailStatus: %d is not from 400 to 599", opts.FailStatus))
	}
	if opts.MaxBody < 0 {
		errs = append(errs, errors.New("negative MaxBody"))
	}
	if opts.Delay < 0 {
		errs = append(errs, errors.New("negative Delay"))
	}
	if opts.Die == nil && (opts.CrashOnHeader || opts.CrashBody != "" || opts.CrashAfterCommit != "") {
		errs = append(errs, errors.New("no Die, which crashing needs"))
	}
	if opts.CrashBody != "" && opts.DiscardBodies {
		errs = append(errs, errors.New("both CrashBody and DiscardBodies"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("example API options: %w", err)
	}

	a := &API{opts: opts, stopped: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = a.release(context.Background()) // nothing is queued: it returns at once
		}
	}()
	if a.store, err = openStore(opts.DB); err != nil {
		return nil, err
	}
	if a.journal, err = openJournal(ArrivalsFile(opts.DB)); err != nil {
		return nil, err
	}
	if opts.Report != "" {
		a.client, err = completion.New(completion.Options{URL: opts.Report, TokenFile: opts.TokenFile, Logger: opts.Logger})
		if err != nil {
			return nil, err
		}
	}
	if a.listener, err = net.Listen("tcp", opts.Addr); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	work := http.Handler(http.HandlerFunc(a.work))
	if a.client != nil {
		work = completion.Middleware(a.client)(work)
	}
	a.server = &http.Server{
		Handler:           a.route(work),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(opts.Logger.Handler(), slog.LevelWarn),
	}
	return a, nil
}

// Addr is the address that the API listens on.
func (a *API) Addr() string { return a.listener.Addr().String() }

// URL is the base address of the API.
func (a *API) URL() string { return "http://" + a.Addr() }

// Run serves until ctx ends, then stops the API within ten seconds. It also
// returns when the API was stopped.
func (a *API) Run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- a.server.Serve(a.listener) }()
	var err error
	select {
	case <-ctx.Done():
	case err = <-served: // stopped, or broken
		served <- err
	}
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	stopErr := a.Stop(limit)
	if err = <-served; errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return errors.Join(err, stopErr)
}

// Stop takes no more requests, ends those under way, delivers the completions
// that are queued, and closes the database. When ctx ends first, connections
// are cut and undelivered completions dropped, which is an error. It may be
// called before Run and more than once; all calls return the same error.
func (a *API) Stop(ctx context.Context) error {
	a.stopOnce.Do(func() {
		defer close(a.stopped)
		a.stopErr = a.release(ctx)
	})
	<-a.stopped
	return a.stopErr
}

func (a *API) release(ctx context.Context) error {
	var errs []error
	if a.server != nil {
		if err := a.server.Shutdown(ctx); err != nil {
			errs = append(errs, fmt.Errorf("shut down: %w", err), a.server.Close())
		}
	}
	if a.listener != nil {
		if err := a.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if a.client != nil {
		errs = append(errs, a.client.Close(ctx))
	}
	if a.store != nil {
		errs = append(errs, a.store.close())
	}
	if a.journal != nil {
		errs = append(errs, a.journal.close())
	}
	return errors.Join(errs...)
}

// Stats counts what the API saw and stored.
func (a *API) Stats(ctx context.Context) (Stats, error) {
	rows, err := a.store.count(ctx)
	if err != nil {
		return Stats{}, err
	}
	s := Stats{Rows: rows}
	s.Arrivals, s.Repeats = a.journal.counts()
	if a.client != nil {
		c := a.client.Stats()
		s.Completions = &c
	}
	return s, nil
}

func (a *API) route(work http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
			work.ServeHTTP(w, r)
		case http.MethodGet, http.MethodHead:
			a.read(w, r)
		default:
			w.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE")
			fail(w, http.StatusMethodNotAllowed, "method not allowed")
		}
	})
}

// work stores the request.
func (a *API) work(w http.ResponseWriter, r *http.Request) {
	row := Row{
		ID:       r.Header.Get(completion.HeaderID),
		Attempt:  1,
		Replay:   r.Header.Get(completion.HeaderReplay),
		Method:   r.Method,
		Target:   r.RequestURI,
		StoredAt: time.Now(),
	}
	if n, err := strconv.Atoi(r.Header.Get(completion.HeaderAttempt)); err == nil {
		row.Attempt = n
	}
	key, beside := r.Header.Get(HeaderKey), 0
	if key != "" && row.Replay != "" {
		beside = a.journal.enter(key)
		defer a.journal.leave(key) // before the client has the answer, which is small
	}
	bodyErr := a.readBody(&row, http.MaxBytesReader(w, r.Body, a.opts.MaxBody))
	err := a.journal.add(Arrival{
		Key: key, Beside: beside, ID: row.ID, Attempt: row.Attempt, Replay: row.Replay, Method: row.Method, Target: row.Target,
		Bytes: row.Bytes, SHA256: row.SHA256, At: row.StoredAt, Incomplete: bodyErr != nil,
	})
	if err != nil {
		a.opts.Logger.Error("arrival not recorded", "err", err, "request_id", row.ID)
		fail(w, http.StatusInternalServerError, "arrival not recorded")
		return
	}

	if a.opts.CrashOnHeader && r.Header.Get(HeaderKill) == "1" ||
		a.opts.CrashBody != "" && bytes.Contains(row.Body, []byte(a.opts.CrashBody)) {
		a.opts.Die()
	}
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(bodyErr, &tooLarge) {
		fail(w, http.StatusRequestEntityTooLarge, "body too large")
		return
	} else if bodyErr != nil {
		fail(w, http.StatusBadRequest, "body broke off")
		return
	}
	if a.opts.Delay > 0 {
		timer := time.NewTimer(a.opts.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done(): // nobody waits for the answer
			fail(w, http.StatusServiceUnavailable, "cancelled")
			return
		}
	}
	switch {
	case r.Header.Get(HeaderReject) == "1":
		fail(w, http.StatusUnprocessableEntity, "rejected on request")
		return
	case a.opts.FailFile != "" && exists(a.opts.FailFile):
		fail(w, a.opts.FailStatus, "broken by a release")
		return
	case a.opts.FailRate > 0 && rand.Float64() < a.opts.FailRate:
		fail(w, a.opts.FailStatus, "failed by chance")
		return
	}

	seq, err := a.store.add(row)
	if err != nil {
		a.opts.Logger.Error("request not stored", "err", err, "request_id", row.ID)
		fail(w, http.StatusInternalServerError, "not stored")
		return
	}
	if a.opts.CrashAfterCommit != "" && mark(a.opts.CrashAfterCommit, row.ID) {
		a.opts.Die()
	}
	answer(w, http.StatusCreated, map[string]any{"seq": seq, "id": row.ID})
}

// readBody sets what the row says of the body, as far as it came.
func (a *API) readBody(row *Row, body io.Reader) error {
	hash := sha256.New()
	to := io.Writer(hash)
	var kept bytes.Buffer
	if !a.opts.DiscardBodies {
		to = io.MultiWriter(hash, &kept)
	}
	var err error
	row.Bytes, err = io.Copy(to, body)
	row.SHA256 = hex.EncodeToString(hash.Sum(nil))
	row.Body = kept.Bytes()
	return err
}

// read answers GET and HEAD.
func (a *API) read(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/":
		answer(w, http.StatusOK, map[string]string{"service": "holdfast example API"})
	case "/stats":
		s, err := a.Stats(r.Context())
		a.answerRead(w, s, err)
	case "/rows":
		after, limit, ok := page(w, r)
		if ok {
			rows, err := readRows(r.Context(), a.store.reader, after, limit, false)
			a.answerRead(w, rows, err)
		}
	case "/arrivals":
		after, limit, ok := page(w, r)
		if ok {
			arrivals, err := ReadArrivals(ArrivalsFile(a.opts.DB), after, limit)
			a.answerRead(w, arrivals, err)
		}
	default:
		fail(w, http.StatusNotFound, "not found")
	}
}

func (a *API) answerRead(w http.ResponseWriter, value any, err error) {
	if err != nil {
		a.opts.Logger.Error("read failed", "err", err)
		fail(w, http.StatusInternalServerError, "read failed")
		return
	}
	answer(w, http.StatusOK, value)
}

// page reads after and limit; it answers 400 itself when they are wrong.
func page(w http.ResponseWriter, r *http.Request) (after int64, limit int, ok bool) {
	q := r.URL.Query()
	limit = maxRows
	if v := q.Get("after"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			fail(w, http.StatusBadRequest, "after: is not a number")
			return 0, 0, false
		}
		after = n
	}
	if v := q.Get("limit"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > maxRows {
			fail(w, http.StatusBadRequest, "limit: is not a number from 1 to "+strconv.Itoa(maxRows))
			return 0, 0, false
		}
		limit = n
	}
	return after, limit, true
}

// mark makes the marker and reports whether it did not exist.
func mark(path, id string) bool {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false
	}
	_, _ = file.WriteString(id + "\n") // the marker counts, its text is for people
	_ = file.Close()
	return true
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func fail(w http.ResponseWriter, status int, reason string) {
	answer(w, status, map[string]string{"error": reason})
}

func answer(w http.ResponseWriter, status int, value any) {
	body, err := json.Marshal(value)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a client that has left needs no answer
}
