package service

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"time"
)

// Problem is an RFC 9457 problem: how the project's own APIs say what is wrong.
type Problem struct {
	Type   string `json:"type"`             // a URI for the kind of problem; about:blank when empty
	Title  string `json:"title"`            // the kind in words; that of the status when empty
	Status int    `json:"status"`           // the status of the answer; 500 when zero
	Detail string `json:"detail,omitempty"` // what is wrong this time
	// Parameter names the query parameter or field at fault, where one is.
	Parameter string `json:"parameter,omitempty"`
	// Item is the position, from 0, of the item at fault in a batch, where one is.
	Item *int `json:"item,omitempty"`
	// RequestID is the UUID of the request that the problem is about, if known.
	RequestID string `json:"request_id,omitempty"`
	// RetryAfter becomes the header Retry-After, in whole seconds rounded up,
	// unless it is zero.
	RetryAfter time.Duration `json:"-"`
}

// ProblemType is the media type of a problem.
const ProblemType = "application/problem+json"

// JSON gives the body of an answer with the problem, and sets what is empty of
// Status, Type and Title.
func (p *Problem) JSON() []byte {
	if p.Status == 0 {
		p.Status = http.StatusInternalServerError
	}
	if p.Type == "" {
		p.Type = "about:blank"
	}
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	body, err := json.Marshal(p)
	if err != nil {
		panic(err) // strings and numbers alone: it cannot fail
	}
	return body
}

// RetrySeconds gives RetryAfter as its header has it.
func (p *Problem) RetrySeconds() string { return strconv.Itoa(int(math.Ceil(p.RetryAfter.Seconds()))) }

// WriteProblem answers with the problem. Headers that the caller has set stay,
// but for those that describe a body.
func WriteProblem(w http.ResponseWriter, p Problem) {
	body := p.JSON()
	h := w.Header()
	for _, name := range []string{"Content-Encoding", "Etag", "Last-Modified", "Trailer"} {
		h.Del(name)
	}
	h.Set("Content-Type", ProblemType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	if p.RetryAfter > 0 {
		h.Set("Retry-After", p.RetrySeconds())
	}
	w.WriteHeader(p.Status)
	// A client that has gone is all that can fail here, and it needs no answer.
	_, _ = w.Write(body)
}

// ProblemMux serves the mux, and answers what it has no handler for (404, and
// 405 with Allow) with a problem rather than with plain text.
func ProblemMux(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, pattern := mux.Handler(r)
		if pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		refusal := refused{ResponseWriter: w, status: http.StatusNotFound}
		h.ServeHTTP(&refusal, r)
		p := Problem{Status: refusal.status, Detail: "there is nothing at this path"}
		if refusal.status == http.StatusMethodNotAllowed {
			p.Detail = "this path does not take the method; Allow lists those that it takes"
		}
		WriteProblem(w, p)
	})
}

// refused keeps the status and the headers of the mux's own refusal, and drops
// its text.
type refused struct {
	http.ResponseWriter
	status int
}

func (r *refused) WriteHeader(status int)      { r.status = status }
func (r *refused) Write(b []byte) (int, error) { return len(b), nil }
