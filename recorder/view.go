package recorder

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// This file is what the read API answers, as JSON. Fields may be added; those
// that are there keep their names and meanings. A field without omitempty or
// omitzero is always there.

// request is what lists and single requests have in common.
type request struct {
	ID         uuid.UUID     `json:"id"`
	State      capture.State `json:"state"`
	Replayable bool          `json:"replayable"` // failed, or received and past its grace, at the time of the answer
	Route      string        `json:"route"`
	Ingress    string        `json:"ingress"`
	Method     string        `json:"method"`
	Target     string        `json:"target"` // in origin form; bytes that are not UTF-8 percent-encoded
	OrderKey   string        `json:"order_key,omitempty"`
	Size       int64         `json:"size"` // bytes of the body
	ReceivedAt time.Time     `json:"received_at"`
	RecordedAt time.Time     `json:"recorded_at"` // by the ledger
	// Status and Error are those of the last attempt that has ended; status is
	// null where there is none or it got no answer.
	Status *int   `json:"status"`
	Error  string `json:"error,omitempty"`
	// GraceEnd is when a received one becomes replayable.
	GraceEnd time.Time `json:"grace_end,omitzero"`
	// PayloadExpired: head and body are gone, the rest is still known.
	PayloadExpired bool `json:"payload_expired,omitempty"`
}

// requestList is the answer of /v1/requests.
type requestList struct {
	Requests   []listedRequest `json:"requests"`
	NextCursor string          `json:"next_cursor,omitempty"` // absent at the end
}

type listedRequest struct {
	request
	Attempts int `json:"attempts"` // how many are known
}

// singleRequest is the answer of /v1/requests/{id}.
type singleRequest struct {
	request
	Attempts    []attempt    `json:"attempts"` // in the order of their numbers
	Events      []event      `json:"events"`
	Quarantines []quarantine `json:"quarantines"`
	Discarded   *discarded   `json:"discarded,omitempty"`
	Policy      policy       `json:"policy"`
	// Headers are in the order in which they were captured; absent when the
	// payload has expired.
	Headers []header `json:"headers,omitempty"`
	// Answers are what routes keep of answers, those of the request's own API
	// first; only for whoever has presented the token.
	Answers []keptAnswer `json:"answers,omitempty"`
}

// keptAnswer is what is kept of the answer to one attempt.
type keptAnswer struct {
	Attempt   int    `json:"attempt"`
	Run       string `json:"run,omitempty"`       // absent for the first try
	Elsewhere bool   `json:"elsewhere,omitempty"` // it is a test system's
	Type      string `json:"content_type,omitempty"`
	Encoding  string `json:"content_encoding,omitempty"`
	Cut       bool   `json:"cut,omitempty"` // body is not all of it
	Body      []byte `json:"body"`          // in base64, in the coding that content_encoding names
}

func answersOf(list []ledger.Answer) []keptAnswer {
	var view []keptAnswer
	for _, a := range list {
		view = append(view, keptAnswer{
			Attempt: a.Attempt, Run: a.Run, Elsewhere: a.Elsewhere, Type: text(a.Type), Encoding: text(a.Encoding), Cut: a.Cut, Body: a.Body,
		})
	}
	return view
}

type attempt struct {
	Number    int             `json:"number"`
	Run       string          `json:"run,omitempty"` // absent for the first try
	StartedAt time.Time       `json:"started_at"`
	EndedAt   time.Time       `json:"ended_at,omitzero"` // absent while it is not known to have ended
	Status    *int            `json:"status"`            // null without an answer
	Error     string          `json:"error,omitempty"`
	Verdict   capture.Verdict `json:"verdict,omitempty"` // absent while there is none
}

type event struct {
	Outcome capture.Verdict `json:"outcome"`
	Attempt int             `json:"attempt"`
	Detail  string          `json:"detail,omitempty"`
	KnownAt time.Time       `json:"known_at,omitzero"` // when the ledger got to know it
}

type quarantine struct {
	Number     int       `json:"number"`
	Reason     string    `json:"reason"`
	Detail     string    `json:"detail,omitempty"`
	At         time.Time `json:"at"`
	ReleasedAt time.Time `json:"released_at,omitzero"` // absent while it holds
}

type discarded struct {
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

type policy struct {
	Completion capture.CompletionBy `json:"completion"`
	Processed  capture.StatusSet    `json:"processed"`
	Failed     capture.StatusSet    `json:"failed"`
	Timeout    string               `json:"timeout"` // such as 30s
	Grace      string               `json:"grace"`
}

type header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

func requestOf(r *ledger.Request) request {
	return request{
		ID: r.ID, State: r.State, Replayable: r.Replayable, Route: r.Route, Ingress: r.Ingress,
		Method: r.Method, Target: text(r.Target), OrderKey: text(r.OrderKey), Size: r.Size,
		ReceivedAt: r.ReceivedAt.UTC(), RecordedAt: r.RecordedAt.UTC(),
		Status: statusOf(r.Status), Error: r.Error, GraceEnd: utc(r.GraceEnd), PayloadExpired: r.PayloadExpired,
	}
}

func singleOf(d *ledger.Detail) singleRequest {
	s := singleRequest{
		request: requestOf(&d.Request),
		Policy: policy{
			Completion: d.Policy.By, Processed: d.Policy.Processed, Failed: d.Policy.Failed,
			Timeout: d.Policy.Timeout.String(), Grace: d.Policy.Grace.String(),
		},
		// Empty lists, not null.
		Attempts:    make([]attempt, len(d.Facts.Attempts)),
		Events:      make([]event, len(d.Facts.Events)),
		Quarantines: make([]quarantine, len(d.Facts.Quarantines)),
	}
	for i, a := range d.Facts.Attempts {
		s.Attempts[i] = attempt{
			Number: a.Number, Run: a.Run, StartedAt: a.StartedAt.UTC(), EndedAt: utc(a.EndedAt),
			Status: statusOf(a.Status), Error: a.Error, Verdict: a.Verdict,
		}
	}
	for i, e := range d.Facts.Events {
		s.Events[i] = event{Outcome: e.Outcome, Attempt: e.Attempt, Detail: e.Detail}
		if i < len(d.EventTimes) {
			s.Events[i].KnownAt = utc(d.EventTimes[i])
		}
	}
	for i, q := range d.Facts.Quarantines {
		s.Quarantines[i] = quarantine{Number: q.Number, Reason: q.Reason, Detail: q.Detail, At: q.At.UTC(), ReleasedAt: utc(q.ReleasedAt)}
	}
	if d.Facts.Discarded {
		s.Discarded = &discarded{Reason: d.DiscardReason, At: d.DiscardedAt.UTC()}
	}
	return s
}

// runList is the answer of /v1/runs, without the reports.
type runList struct {
	Runs       []run  `json:"runs"`
	NextCursor string `json:"next_cursor,omitempty"`
}

// run is a replay run.
type run struct {
	ID         string           `json:"id"`
	State      ledger.RunState  `json:"state"`
	Filter     ledger.Filter    `json:"filter"`
	Target     string           `json:"target,omitempty"` // absent: each request's own upstream
	MaxSeq     int64            `json:"max_seq"`          // requests that the ledger got to know later are not selected
	CreatedAt  time.Time        `json:"created_at"`
	UpdatedAt  time.Time        `json:"updated_at"`
	EndedAt    time.Time        `json:"ended_at,omitzero"`
	Owner      string           `json:"owner,omitempty"`
	LeaseUntil time.Time        `json:"lease_until,omitzero"`
	Counts     ledger.RunCounts `json:"counts"`
	Report     json.RawMessage  `json:"report,omitempty"` // once it has ended
}

func runOf(r *ledger.Run) run {
	view := run{
		ID: r.ID, State: r.State, Filter: r.Filter, Target: r.Target, MaxSeq: r.MaxSeq,
		CreatedAt: r.CreatedAt.UTC(), UpdatedAt: r.UpdatedAt.UTC(), EndedAt: utc(r.EndedAt),
		Owner: r.Owner, LeaseUntil: utc(r.LeaseUntil), Counts: r.Counts,
	}
	if json.Valid(r.Report) {
		view.Report = r.Report
	}
	return view
}

// stats is the answer of /v1/stats.
type stats struct {
	Requests         map[capture.State]int64 `json:"requests"` // by state
	Aside            map[string]int64        `json:"aside"`    // by kind
	Early            int64                   `json:"early"`    // facts about requests whose capture has not come
	EarlyDropped     int64                   `json:"early_dropped"`
	Expired          int64                   `json:"expired"`
	OldestReplayable time.Time               `json:"oldest_replayable,omitzero"` // received_at; absent when nothing is replayable
	PayloadBytes     int64                   `json:"payload_bytes"`              // of processed requests
	FreeBytes        *int64                  `json:"free_bytes"`                 // null when not known
	Replays          map[string]int64        `json:"replays"`                    // ended attempts of replay runs by result
	Ingresses        []ingress               `json:"ingresses"`
}

// ingress is what its last heartbeat said, by the ledger's clock.
type ingress struct {
	ID               string    `json:"id"`
	SeenAt           time.Time `json:"seen_at"`
	Unreleased       int       `json:"unreleased"` // records in its spool
	OldestUnreleased time.Time `json:"oldest_unreleased,omitzero"`
}

func statsOf(s *ledger.Stats, ingresses []ledger.Ingress) stats {
	view := stats{
		Requests: s.Requests, Aside: s.Aside, Early: s.Early, EarlyDropped: s.EarlyDropped, Expired: s.Expired,
		OldestReplayable: utc(s.OldestReplayable), PayloadBytes: s.PayloadBytes, Replays: s.Replays,
		Ingresses: make([]ingress, len(ingresses)),
	}
	if s.FreeBytes >= 0 {
		view.FreeBytes = &s.FreeBytes
	}
	for i, one := range ingresses {
		view.Ingresses[i] = ingress{ID: one.ID, SeenAt: one.SeenAt.UTC(), Unreleased: one.Unreleased, OldestUnreleased: utc(one.OldestUnreleased)}
	}
	return view
}

// asideList is the answer of /v1/aside, oldest first.
type asideList struct {
	Aside      []aside `json:"aside"`
	NextCursor string  `json:"next_cursor,omitempty"`
}

// aside is a message that nobody could take, or a head that waits for its body.
type aside struct {
	Seq       int64     `json:"seq"`
	Kind      string    `json:"kind"` // capture, completion, incomplete
	Reason    string    `json:"reason"`
	Subject   string    `json:"subject"`
	RequestID string    `json:"request_id,omitempty"` // where it could be read
	At        time.Time `json:"at"`
	Header    string    `json:"header,omitempty"` // of NATS, as lines
	// Data is at most the first 64 KiB, in base64, and only for whoever has
	// presented the token; credentials in header lines are redacted.
	Data []byte `json:"data,omitempty"`
}

func asideOf(a *ledger.Aside, data bool) aside {
	view := aside{
		Seq: a.Seq, Kind: a.Kind, Reason: text(a.Reason), Subject: text(a.Subject), At: a.At.UTC(), Header: text(string(a.Header)),
	}
	if a.RequestID != uuid.Nil {
		view.RequestID = a.RequestID.String()
	}
	if data {
		view.Data = redact(a.Data)
	}
	return view
}

func statusOf(status int) *int {
	if status == 0 {
		return nil
	}
	return &status
}

// utc keeps a zero time zero, so that omitzero leaves it out.
func utc(t time.Time) time.Time {
	if t.IsZero() {
		return time.Time{}
	}
	return t.UTC()
}

// text percent-encodes bytes that are not valid UTF-8, which JSON cannot hold.
func text(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 {
			fmt.Fprintf(&b, "%%%02X", s[i])
		} else {
			b.WriteString(s[i : i+n])
		}
		i += n
	}
	return b.String()
}
