package acker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/semaphore"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
)

const (
	// maxBody is the size of the largest batch, maxBatch its number of events:
	// one transaction each, and whoever writes to the ledger waits for it.
	maxBody  = 1 << 20
	maxBatch = 5_000
	// bodyBudget bounds the bodies in memory at once; decoded they take some five
	// times as much. A body counts with its announced length, or with the
	// largest allowed.
	bodyBudget = 16 << 20
	// drainLimit is how much of a body that is too large is read and thrown away,
	// so that its sender gets the 413. Beyond that it may meet a reset.
	drainLimit = 8 << 20
	// smallBody is what a request without a body counts for.
	smallBody = 1 << 10
	// retryAfter is what a 503 tells: a lock is gone by then, and a queue
	// drained.
	retryAfter = time.Second
)

// api is the HTTP side.
type api struct {
	committer *committer
	bodies    *semaphore.Weighted
}

func (a *api) handler() http.Handler {
	a.bodies = semaphore.NewWeighted(bodyBudget)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/completions", a.post)
	mux.HandleFunc("PUT /v1/completions/{id}", a.put)
	mux.HandleFunc("DELETE /v1/requests/{id}", a.delete)
	return service.ProblemMux(mux)
}

// post takes events.
func (a *api) post(w http.ResponseWriter, r *http.Request) {
	body, release, ok := a.read(w, r, maxBody)
	if !ok {
		return
	}
	defer release()
	// As many as the body holds, so that too many are told from malformed ones.
	events, err := capture.DecodeEvents(body, len(body))
	if err != nil {
		malformed(w, err)
		return
	}
	if len(events) > maxBatch {
		service.WriteProblem(w, service.Problem{
			Status: http.StatusRequestEntityTooLarge,
			Detail: fmt.Sprintf("%d events are too many, %d are allowed; send them in several requests", len(events), maxBatch),
		})
		return
	}
	a.commit(w, r, events)
}

// put takes the fields of one event, all of which may be left out: the id is the
// path's, the outcome processed, the attempt 1.
func (a *api) put(w http.ResponseWriter, r *http.Request) {
	id, ok := pathID(w, r)
	if !ok {
		return
	}
	body, release, ok := a.read(w, r, capture.MaxEventBytes)
	if !ok {
		return
	}
	defer release()
	event := capture.Event{ID: id, Outcome: capture.Processed, Attempt: capture.FirstAttempt}
	if len(strings.TrimSpace(string(body))) > 0 {
		var err error
		if event, err = putEvent(id, body); err != nil {
			malformed(w, err)
			return
		}
	}
	a.commit(w, r, []capture.Event{event})
}

func putEvent(id uuid.UUID, body []byte) (capture.Event, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err != nil || fields == nil {
		return capture.Event{}, &capture.EventError{Reason: "the body is not a JSON object with the fields of an event"}
	}
	has := func(name string) bool {
		for field := range fields { // as encoding/json finds them
			if strings.EqualFold(field, name) {
				return true
			}
		}
		return false
	}
	if !has("id") {
		fields["id"], _ = json.Marshal(id) // a UUID always marshals
	}
	if !has("outcome") {
		fields["outcome"] = json.RawMessage(`"processed"`)
	}
	whole, err := json.Marshal(fields)
	if err != nil {
		return capture.Event{}, fmt.Errorf("%w: %w", capture.ErrMalformed, err)
	}
	events, err := capture.DecodeEvents(whole, 1)
	if err != nil {
		return capture.Event{}, err
	}
	if events[0].ID != id {
		return capture.Event{}, &capture.EventError{Parameter: "id", Reason: "is not that of the path"}
	}
	return events[0], nil
}

// delete is a bare put.
func (a *api) delete(w http.ResponseWriter, r *http.Request) {
	id, ok := pathID(w, r)
	if !ok || !known(w, r) {
		return
	}
	a.commit(w, r, []capture.Event{{ID: id, Outcome: capture.Processed, Attempt: capture.FirstAttempt}})
}

// commit answers 202 once the ledger holds the events.
func (a *api) commit(w http.ResponseWriter, r *http.Request, events []capture.Event) {
	refused, err := a.committer.submit(r.Context(), eventFacts(events))
	if err != nil {
		if r.Context().Err() != nil {
			return // the client has gone
		}
		service.WriteProblem(w, service.Problem{
			Status: http.StatusServiceUnavailable, RetryAfter: retryAfter,
			Detail: "the ledger cannot commit at the moment; it is not known whether the completions are held, send them again",
		})
		return
	}
	for i, err := range refused {
		if err != nil {
			service.WriteProblem(w, service.Problem{
				Status: http.StatusBadRequest, Item: &i, RequestID: events[i].ID.String(),
				Detail: "the ledger cannot take this event: " + err.Error() + "; the others are held",
			})
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	// A client that has gone is all that can fail here.
	_, _ = fmt.Fprintf(w, "{\"accepted\":%d}\n", len(events))
}

// read checks the query and reads the body, or answers.
func (a *api) read(w http.ResponseWriter, r *http.Request, limit int64) (body []byte, release func(), ok bool) {
	if !known(w, r) {
		return nil, nil, false
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		service.WriteProblem(w, service.Problem{
			Status: http.StatusUnsupportedMediaType, Parameter: "Content-Encoding",
			Detail: fmt.Sprintf("Content-Encoding %.40q is not supported; send the body as it is", e),
		})
		return nil, nil, false
	}
	tooLarge := func() {
		// A connection that is closed on unread bytes is reset, and the client then
		// may not see the answer.
		if r.Header.Get("Expect") == "" {
			_, _ = io.CopyN(io.Discard, r.Body, drainLimit)
		}
		service.WriteProblem(w, service.Problem{
			Status: http.StatusRequestEntityTooLarge,
			Detail: fmt.Sprintf("the body has more than %d bytes; send it in several requests", limit),
		})
	}
	weight := r.ContentLength
	switch {
	case weight > limit:
		tooLarge()
		return nil, nil, false
	case weight < 0:
		weight = limit
	}
	weight = max(weight, smallBody)
	if !a.bodies.TryAcquire(weight) {
		service.WriteProblem(w, service.Problem{
			Status: http.StatusServiceUnavailable, RetryAfter: retryAfter, Detail: "too many bodies are in memory",
		})
		return nil, nil, false
	}
	release = func() { a.bodies.Release(weight) }
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err == nil {
		return body, release, true
	}
	release()
	if _, is := errors.AsType[*http.MaxBytesError](err); is {
		tooLarge()
	} else {
		service.WriteProblem(w, service.Problem{Status: http.StatusBadRequest, Detail: "the body did not come whole"})
	}
	return nil, nil, false
}

// known refuses query parameters: there are none, and a typo must not pass for
// a bare completion.
func known(w http.ResponseWriter, r *http.Request) bool {
	names := make([]string, 0, 1)
	for name := range r.URL.Query() {
		names = append(names, name)
	}
	if len(names) == 0 && r.URL.RawQuery == "" {
		return true
	}
	p := service.Problem{Status: http.StatusBadRequest, Detail: "query parameters are not allowed here"}
	if len(names) > 0 {
		p.Parameter = slices.Min(names)
	}
	service.WriteProblem(w, p)
	return false
}

func pathID(w http.ResponseWriter, r *http.Request) (uuid.UUID, bool) {
	id, err := uuid.Parse(r.PathValue("id"))
	if err != nil || id == uuid.Nil {
		service.WriteProblem(w, service.Problem{
			Status: http.StatusBadRequest, Parameter: "id", Detail: "the id in the path is not a UUID",
		})
		return uuid.Nil, false
	}
	return id, true
}

// malformed answers 400, naming the event and the field at fault.
func malformed(w http.ResponseWriter, err error) {
	p := service.Problem{Status: http.StatusBadRequest, Detail: err.Error()}
	if e, is := errors.AsType[*capture.EventError](err); is {
		p.Item, p.Parameter = &e.Index, e.Parameter
	}
	service.WriteProblem(w, p)
}
