package recorder

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/service"
)

const (
	// maxReaders bounds the requests that are answered at the same time: more
	// than the ledger reads at once, fewer than would pile up memory.
	maxReaders = 32
	// readTimeout bounds what the ledger may take for one answer: a listing whose
	// filter matches little of many million requests takes that long.
	readTimeout = 30 * time.Second
	// stallTimeout is how long a reader of a raw message may take for one part of
	// copyPart bytes.
	stallTimeout = 30 * time.Second
	copyPart     = 64 << 10
	// retryAfter is what a 503 tells the client to wait: locks last for
	// milliseconds to seconds.
	retryAfter = time.Second
)

// api is the read API.
type api struct {
	store   ledger.Reader
	secrets bool // whoever gets in has presented the token
	slots   chan struct{}
	log     *slog.Logger
}

func newAPI(store ledger.Reader, tokenFile string, logger *slog.Logger) (http.Handler, error) {
	require, err := service.RequireToken(tokenFile, logger)
	if err != nil {
		return nil, err
	}
	a := &api{store: store, secrets: tokenFile != "", slots: make(chan struct{}, maxReaders), log: logger}
	mux := http.NewServeMux()
	for pattern, f := range map[string]endpoint{
		"GET /v1/requests":           a.requests,
		"GET /v1/requests/{id}":      a.request,
		"GET /v1/requests/{id}/http": a.raw,
		"GET /v1/runs":               a.runs,
		"GET /v1/runs/{id}":          a.run,
		"GET /v1/stats":              a.stats,
		"GET /v1/aside":              a.aside,
	} {
		mux.Handle(pattern, a.serve(f))
	}
	return require(service.ProblemMux(mux)), nil
}

// endpoint answers one request. A *service.Problem as error, in the form of
// problemError, is the answer; other errors are the ledger's.
type endpoint func(w http.ResponseWriter, r *http.Request) error

// problemError makes a problem an error.
type problemError struct{ service.Problem }

func (e *problemError) Error() string { return e.Detail }

// invalid is a 400 that names the parameter.
func invalid(parameter, format string, args ...any) error {
	return &problemError{service.Problem{Status: http.StatusBadRequest, Parameter: parameter, Detail: parameter + " " + fmt.Sprintf(format, args...)}}
}

func (a *api) serve(f endpoint) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case a.slots <- struct{}{}:
			defer func() { <-a.slots }()
		default:
			service.WriteProblem(w, service.Problem{
				Status: http.StatusServiceUnavailable, Detail: "too many requests are being answered", RetryAfter: retryAfter,
			})
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if err := f(w, r); err != nil {
			a.fail(w, r, err)
		}
	})
}

// fail answers an error.
func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	var p service.Problem
	problem, own := errors.AsType[*problemError](err)
	switch {
	case own:
		p = problem.Problem
	case r.Context().Err() != nil:
		return // nobody is there any more
	case errors.Is(err, ledger.ErrInvalidCursor):
		p = service.Problem{Status: http.StatusBadRequest, Parameter: "cursor", Detail: "cursor is not one that this listing gave; allowed is a next_cursor as it was given"}
	case errors.Is(err, ledger.ErrNotFound):
		p = service.Problem{Status: http.StatusNotFound, Detail: "the ledger knows nothing of that id"}
	case errors.Is(err, context.DeadlineExceeded):
		p = service.Problem{Status: http.StatusServiceUnavailable, Detail: "the ledger took too long; ask for less, for instance a shorter time", RetryAfter: retryAfter}
	case errors.Is(err, ledger.ErrUnavailable):
		p = service.Problem{Status: http.StatusServiceUnavailable, Detail: "the ledger is not available for the moment", RetryAfter: retryAfter}
	default:
		a.log.Error("a question to the ledger failed", "err", err)
		p = service.Problem{Status: http.StatusInternalServerError, Detail: "the ledger failed; the log says how"}
	}
	p.RequestID = knownID(r)
	service.WriteProblem(w, p)
}

// knownID is the id in the path of a request, where there is a valid one.
func knownID(r *http.Request) string {
	id, err := pathID(r)
	if err != nil || !strings.HasPrefix(r.URL.Path, "/v1/requests/") {
		return ""
	}
	return id.String()
}

func pathID(r *http.Request) (uuid.UUID, error) {
	text := r.PathValue("id")
	id, err := uuid.Parse(text)
	if err != nil || len(text) != len(uuid.Nil.String()) { // Parse takes other spellings too
		return uuid.Nil, invalid("id", "is not a UUID; allowed is one like 0190a5c2-7b1e-7c3d-8e4f-5a6b7c8d9e0f")
	}
	return id, nil
}

func writeJSON(w http.ResponseWriter, answer any) error {
	body, err := json.Marshal(answer)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)+1))
	// A client that has gone is all that can fail here.
	_, _ = w.Write(append(body, '\n'))
	return nil
}

func (a *api) requests(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readTimeout)
	defer cancel()
	q, err := parseQuery(r, "state", "route", "method", "path", "status", "since", "until", "limit", "cursor")
	if err != nil {
		return err
	}
	now, err := a.store.Now(ctx)
	if err != nil {
		return err
	}
	filter, err := q.filter(now)
	if err != nil {
		return err
	}
	limit, err := q.limit(defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	page, err := a.store.List(ctx, filter, q.get("cursor"), limit)
	if err != nil {
		return err
	}
	answer := requestList{Requests: make([]listedRequest, len(page.Requests)), NextCursor: page.Next}
	for i := range page.Requests {
		answer.Requests[i] = listedRequest{requestOf(&page.Requests[i]), page.Requests[i].Attempts}
	}
	return writeJSON(w, answer)
}

func (a *api) request(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readTimeout)
	defer cancel()
	if _, err := parseQuery(r); err != nil {
		return err
	}
	id, err := pathID(r)
	if err != nil {
		return err
	}
	detail, err := a.store.Get(ctx, id)
	if err != nil {
		return err
	}
	answer := singleOf(&detail)
	if !detail.PayloadExpired {
		head, body, err := a.store.Payload(ctx, id)
		switch {
		case err == nil:
			_ = body.Close() // nothing of it was read
			answer.Headers = headersOf(a.shown(head))
		case errors.Is(err, ledger.ErrNotFound): // it has expired meanwhile
			answer.PayloadExpired = true
		default:
			return err
		}
	}
	if a.secrets {
		answers, err := a.store.Answers(ctx, id)
		if err != nil {
			return err
		}
		answer.Answers = answersOf(answers)
	}
	return writeJSON(w, answer)
}

// shown is the head as this API may show it.
func (a *api) shown(head []byte) []byte {
	if a.secrets {
		return head
	}
	return redact(head)
}

// raw gives the message as it was captured. The body is never whole in memory,
// unless it was captured in one message.
func (a *api) raw(w http.ResponseWriter, r *http.Request) error {
	if _, err := parseQuery(r); err != nil {
		return err
	}
	id, err := pathID(r)
	if err != nil {
		return err
	}
	detail, err := a.store.Get(r.Context(), id)
	if err != nil {
		return err
	}
	gone := &problemError{service.Problem{Status: http.StatusGone, Detail: "the request is known, its head and body have expired"}}
	if detail.PayloadExpired {
		return gone
	}
	head, body, err := a.store.Payload(r.Context(), id)
	if errors.Is(err, ledger.ErrNotFound) {
		return gone
	}
	if err != nil {
		return err
	}
	defer body.Close()
	// What cannot be read at all is still answered with a problem.
	reader := bufio.NewReaderSize(body, copyPart)
	if _, err := reader.Peek(1); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	head = a.shown(head)
	w.Header().Set("Content-Type", "application/http;msgtype=request")
	w.Header().Set("Content-Length", strconv.FormatInt(int64(len(head))+detail.Size, 10))
	if r.Method == http.MethodHead {
		return nil
	}
	if err := send(w, head, reader); err != nil {
		if r.Context().Err() == nil {
			a.log.Warn("a message was not sent whole", "request_id", id, "err", err)
		}
		// The head of the answer is out: breaking off is the only way to say it.
		panic(http.ErrAbortHandler)
	}
	return nil
}

// send writes head and body, with a time limit for each part rather than for
// the whole.
func send(w http.ResponseWriter, head []byte, body io.Reader) error {
	control := http.NewResponseController(w)
	part := make([]byte, copyPart)
	for {
		if err := control.SetWriteDeadline(time.Now().Add(stallTimeout)); err != nil {
			return fmt.Errorf("set deadline: %w", err)
		}
		if _, err := w.Write(head); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		n, err := io.ReadFull(body, part)
		head = part[:n]
		switch {
		case n == 0 && errors.Is(err, io.EOF):
			return nil
		case err != nil && !errors.Is(err, io.ErrUnexpectedEOF):
			return fmt.Errorf("read body: %w", err)
		}
	}
}

func (a *api) runs(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readTimeout)
	defer cancel()
	q, err := parseQuery(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := q.limit(defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	runs, next, err := a.store.Runs(ctx, q.get("cursor"), limit)
	if err != nil {
		return err
	}
	answer := runList{Runs: make([]run, len(runs)), NextCursor: next}
	for i := range runs {
		answer.Runs[i] = runOf(&runs[i])
		answer.Runs[i].Report = nil
	}
	return writeJSON(w, answer)
}

func (a *api) run(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readTimeout)
	defer cancel()
	if _, err := parseQuery(r); err != nil {
		return err
	}
	id, err := pathID(r)
	if err != nil {
		return err
	}
	one, err := a.store.Run(ctx, id.String())
	if err != nil {
		return err
	}
	return writeJSON(w, runOf(&one))
}

func (a *api) stats(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readTimeout)
	defer cancel()
	if _, err := parseQuery(r); err != nil {
		return err
	}
	s, err := a.store.Stats(ctx)
	if err != nil {
		return err
	}
	ingresses, err := a.store.Ingresses(ctx)
	if err != nil {
		return err
	}
	return writeJSON(w, statsOf(&s, ingresses))
}

func (a *api) aside(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), readTimeout)
	defer cancel()
	q, err := parseQuery(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := q.limit(defaultAsideLimit, maxAsideLimit)
	if err != nil {
		return err
	}
	list, next, err := a.store.AsideList(ctx, q.get("cursor"), limit)
	if err != nil {
		return err
	}
	answer := asideList{Aside: make([]aside, len(list)), NextCursor: next}
	for i := range list {
		answer.Aside[i] = asideOf(&list[i], a.secrets)
	}
	return writeJSON(w, answer)
}
