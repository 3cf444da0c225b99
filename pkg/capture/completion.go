package capture

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Limits of completion events: what an API sends beyond them is refused, not
// cut.
const (
	MaxEventBytes  = 64 << 10 // one event as JSON
	MaxDetailBytes = 8 << 10  // its detail
)

type outcomeJSON struct {
	V         int        `json:"v,omitempty"`
	ID        uuid.UUID  `json:"id"`
	Ingress   string     `json:"ingress,omitempty"`
	Attempt   int        `json:"attempt"`
	Run       string     `json:"run,omitempty"`
	StartedAt time.Time  `json:"started_at"`
	EndedAt   *time.Time `json:"ended_at,omitempty"`
	Status    int        `json:"status,omitempty"`
	Error     string     `json:"error,omitempty"`
	Verdict   Verdict    `json:"verdict,omitempty"`
	Answer    *Answer    `json:"answer,omitempty"`
}

// AppendJSON appends the outcome as one line of JSON, without a newline. It
// never fails: the error text is the gateway's own and is made valid UTF-8.
func (o *Outcome) AppendJSON(dst []byte) []byte {
	a := &o.Attempt
	dst = append(dst, `{"id":"`...)
	dst = append(dst, o.ID.String()...)
	dst = append(dst, '"')
	if o.Ingress != "" {
		dst = append(dst, `,"ingress":"`...)
		dst = append(dst, o.Ingress...) // ValidIngress: needs no escape
		dst = append(dst, '"')
	}
	dst = append(dst, `,"attempt":`...)
	dst = strconv.AppendInt(dst, int64(a.Number), 10)
	if a.Run != "" {
		dst = append(dst, `,"run":`...)
		dst = appendString(dst, a.Run)
	}
	dst = append(dst, `,"started_at":"`...)
	dst = a.StartedAt.UTC().AppendFormat(dst, time.RFC3339Nano)
	dst = append(dst, '"')
	if !a.EndedAt.IsZero() {
		dst = append(dst, `,"ended_at":"`...)
		dst = a.EndedAt.UTC().AppendFormat(dst, time.RFC3339Nano)
		dst = append(dst, '"')
	}
	if a.Status != 0 {
		dst = append(dst, `,"status":`...)
		dst = strconv.AppendInt(dst, int64(a.Status), 10)
	}
	if a.Error != "" {
		dst = append(dst, `,"error":`...)
		dst = appendString(dst, a.Error)
	}
	if a.Verdict != NoVerdict {
		dst = append(dst, `,"verdict":"`...)
		dst = append(dst, a.Verdict...)
		dst = append(dst, '"')
	}
	if o.Answer != nil {
		dst = append(dst, `,"answer":`...)
		dst = o.Answer.appendJSON(dst)
	}
	return append(dst, '}')
}

func appendString(dst []byte, s string) []byte {
	quoted, err := json.Marshal(strings.ToValidUTF8(s, "\uFFFD"))
	if err != nil { // a string always marshals
		return append(dst, `""`...)
	}
	return append(dst, quoted...)
}

// DecodeOutcome reads what [Outcome.AppendJSON] wrote. Errors wrap
// [ErrMalformed] or [ErrNewerVersion].
func DecodeOutcome(data []byte) (Outcome, error) {
	var j outcomeJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return Outcome{}, fmt.Errorf("decode outcome: %w: %w", ErrMalformed, err)
	}
	switch {
	case j.V > version:
		return Outcome{}, fmt.Errorf("decode outcome: %w: %d, known is %d", ErrNewerVersion, j.V, version)
	case j.ID == uuid.Nil:
		return Outcome{}, fmt.Errorf("decode outcome: %w: no id", ErrMalformed)
	case j.Attempt < FirstAttempt:
		return Outcome{}, fmt.Errorf("decode outcome: %w: attempt %d", ErrMalformed, j.Attempt)
	case !j.Verdict.Valid():
		return Outcome{}, fmt.Errorf("decode outcome: %w: verdict %q", ErrMalformed, j.Verdict)
	case j.Ingress != "" && !ValidIngress(j.Ingress):
		return Outcome{}, fmt.Errorf("decode outcome: %w: ingress %q", ErrMalformed, j.Ingress)
	case j.Answer != nil && len(j.Answer.Body) > MaxAnswer:
		return Outcome{}, fmt.Errorf("decode outcome: %w: an answer of %d bytes", ErrMalformed, len(j.Answer.Body))
	}
	o := Outcome{ID: j.ID, Ingress: j.Ingress, Answer: j.Answer, Attempt: Attempt{
		Number: j.Attempt, Run: j.Run, StartedAt: j.StartedAt, Status: j.Status, Error: j.Error, Verdict: j.Verdict,
	}}
	if j.EndedAt != nil {
		o.Attempt.EndedAt = *j.EndedAt
	}
	return o, nil
}

// DecodeOutcomes reads the data of a message on [OutcomeSubject]: one outcome a
// line. It returns all that can be read, and an error that joins those of the
// lines that cannot.
func DecodeOutcomes(data []byte) ([]Outcome, error) {
	outcomes := make([]Outcome, 0, bytes.Count(data, []byte{'\n'})+1)
	var errs []error
	for line := range bytes.Lines(data) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		o, err := DecodeOutcome(line)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		outcomes = append(outcomes, o)
	}
	if len(outcomes) == 0 && len(errs) == 0 {
		errs = append(errs, fmt.Errorf("decode outcomes: %w: none", ErrMalformed))
	}
	return outcomes, errors.Join(errs...)
}

// EventError says which event of several is at fault, and why.
type EventError struct {
	Index     int    // from 0
	Parameter string // the field at fault, empty when it is the whole event
	Reason    string
}

// Error names the event, counting from 0, and its field.
func (e *EventError) Error() string {
	at := fmt.Sprintf("event %d", e.Index)
	if e.Parameter != "" {
		at += ": " + e.Parameter
	}
	return at + ": " + e.Reason
}

// Unwrap makes every EventError an [ErrMalformed].
func (e *EventError) Unwrap() error { return ErrMalformed }

type eventJSON struct {
	V       *int    `json:"v"`
	ID      *string `json:"id"`
	Outcome *string `json:"outcome"`
	Attempt *int    `json:"attempt"`
	Detail  *string `json:"detail"`
}

// DecodeEvents reads one event, an array of events, or one event a line
// (NDJSON). It returns all of them or an error, which is an [*EventError] where
// one event is at fault, and wraps [ErrMalformed] in any case. Fields it does
// not know are ignored: an API may send more than we ask for. At most limit
// events are taken.
func DecodeEvents(data []byte, limit int) ([]Event, error) {
	trimmed := bytes.TrimLeft(data, " \t\r\n")
	if len(trimmed) == 0 {
		return nil, fmt.Errorf("%w: no event", ErrMalformed)
	}
	dec := json.NewDecoder(bytes.NewReader(trimmed))
	array := trimmed[0] == '['
	if array {
		if _, err := dec.Token(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	}
	var events []Event
	for {
		if array && !dec.More() {
			if _, err := dec.Token(); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
			}
			if _, err := dec.Token(); !errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("%w: something follows the array", ErrMalformed)
			}
			return events, nil
		}
		var j eventJSON
		err := dec.Decode(&j)
		if !array && errors.Is(err, io.EOF) {
			return events, nil
		}
		if len(events) >= limit {
			return nil, fmt.Errorf("%w: more than %d events", ErrMalformed, limit)
		}
		if err != nil {
			e := &EventError{Index: len(events), Reason: err.Error()}
			var typeErr *json.UnmarshalTypeError
			if errors.As(err, &typeErr) {
				e.Parameter = typeErr.Field
				e.Reason = "is a " + typeErr.Value + ", not a " + typeErr.Type.String()
			}
			return nil, e
		}
		event, bad := j.event()
		if bad != nil {
			bad.Index = len(events)
			return nil, bad
		}
		events = append(events, event)
	}
}

func (j *eventJSON) event() (Event, *EventError) {
	fail := func(parameter, reason string) (Event, *EventError) {
		return Event{}, &EventError{Parameter: parameter, Reason: reason}
	}
	e := Event{Attempt: FirstAttempt}
	switch {
	case j.V != nil && *j.V != version:
		return fail("v", "is not 1")
	case j.ID == nil:
		return fail("id", "is missing")
	case j.Outcome == nil:
		return fail("outcome", `is missing; "processed" and "failed" are allowed`)
	}
	id, err := uuid.Parse(*j.ID)
	if err != nil || id == uuid.Nil {
		return fail("id", "is not a UUID")
	}
	e.ID = id
	e.Outcome = Verdict(*j.Outcome)
	if e.Outcome != Processed && e.Outcome != Failed {
		return fail("outcome", `is neither "processed" nor "failed"`)
	}
	if j.Attempt != nil {
		if e.Attempt = *j.Attempt; e.Attempt < FirstAttempt || e.Attempt > 1<<30 {
			return fail("attempt", "is not a number from 1")
		}
	}
	if j.Detail != nil {
		if e.Detail = *j.Detail; len(e.Detail) > MaxDetailBytes {
			return fail("detail", fmt.Sprintf("has more than %d bytes", MaxDetailBytes))
		}
	}
	return e, nil
}

// AppendJSON appends the event as one line of JSON, without a newline.
func (e *Event) AppendJSON(dst []byte) []byte {
	dst = append(dst, `{"id":"`...)
	dst = append(dst, e.ID.String()...)
	dst = append(dst, `","outcome":"`...)
	dst = append(dst, e.Outcome...)
	dst = append(dst, `","attempt":`...)
	dst = strconv.AppendInt(dst, int64(e.Attempt), 10)
	if e.Detail != "" {
		dst = append(dst, `,"detail":`...)
		dst = appendString(dst, e.Detail)
	}
	return append(dst, '}')
}
