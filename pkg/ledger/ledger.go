package ledger

import (
	"context"
	"io"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// Store is the whole contract. Services declare the part they use.
type Store interface {
	Recorder
	Completer
	Reader
	Replayer
	Operator
	Keeper

	// Ping reports whether the store can be read and written right now.
	Ping(ctx context.Context) error
	// Close releases everything. It is idempotent.
	Close() error
}

// Item is one message of the requests stream.
type Item struct {
	Captured capture.Captured
	// Ref names the spool record it came from; zero when it has none.
	Ref capture.SpoolRef
}

// Result says what became of one item of a batch.
type Result struct {
	// Err is not nil when the store cannot take this item's data, whatever else
	// happens: the caller sets it aside. Everything else is held.
	Err error
	// Released are the spool records that this commit, or an earlier one, made
	// superfluous: the item's own, and those of chunks and head of a request
	// that it completed. It is empty while a chunk waits for the rest: chunks
	// and head earn their words together, by the commit after which the whole
	// body is there and matches its hash.
	Released []capture.SpoolRef
	// New is true when this item made a request known that was not known before.
	New bool
}

// Recorder takes what the requests stream carries.
type Recorder interface {
	// Record commits captures, chunks and abandon records, in one transaction,
	// in any order and any repetition; results[i] belongs to items[i].
	//
	// A request whose body came in chunks is known, and may be listed and
	// replayed, only once it is complete. A head whose chunks are missing waits
	// and is listed as set aside (kind "incomplete"); it completes when they
	// come. All chunks there and the hash wrong is an error of the item that
	// completed it; the head is then set aside with that reason, and it and the
	// chunks are released. The chunks are kept.
	// An abandon record drops the chunks of its id if no head is known, and
	// is otherwise without effect; it and they are released. A chunk that comes
	// after its abandon record is dropped and released.
	//
	// A request needs an id that is a UUID of version 7: their order is the
	// order of listing and sending.
	//
	// A capture received longer ago than the retention minus a day, or than
	// half of it where that is more (Options.Retention of the store; 0 turns
	// this off), enters with a quarantine of reason "late".
	//
	// A new request makes the ingress that its Ref names known, as one that was
	// never heard from, unless a heartbeat of it is kept: see [Ingress].
	//
	// Errors: [ErrFull], [ErrUnavailable].
	Record(ctx context.Context, items []Item) ([]Result, error)
	// SetAside keeps messages that nobody can take, with the reason, once each
	// (by Fingerprint).
	SetAside(ctx context.Context, messages []Aside) error
	// SaveHeartbeats keeps the last heartbeat of each ingress, and forgets one
	// that says it stopped. Times are shifted to the ledger's clock: each was
	// sent its Age before the call, however long the call takes. What they say of
	// their captures is kept apart: see [Start].
	SaveHeartbeats(ctx context.Context, beats []capture.Heartbeat) error
}

// Aside is a message that was set aside.
type Aside struct {
	Seq         int64  // the ledger's, given on insert
	Kind        string // "capture", "completion", "incomplete", …: the metric's label
	Reason      string
	Subject     string
	RequestID   uuid.UUID // uuid.Nil when it could not be read
	Header      []byte    // NATS header as lines, for people
	Data        []byte
	At          time.Time
	Fingerprint [32]byte // SHA-256 of subject, header and data: a redelivery is not set aside twice
}

// Fact is one completion fact: exactly one field is set.
type Fact struct {
	Outcome *capture.Outcome
	Event   *capture.Event
}

// ID is the id of the request that the fact is about.
func (f Fact) ID() uuid.UUID {
	if f.Outcome != nil {
		return f.Outcome.ID
	}
	return f.Event.ID
}

// MaxDetails is how many events are kept of one request, attempt and outcome,
// which differ in their detail alone.
const MaxDetails = 16

// Completer takes facts about attempts and completions.
type Completer interface {
	// Complete commits facts in one transaction, in any order and repetition;
	// errs[i] is not nil when the store cannot take facts[i], whatever else
	// happens. Facts about unknown ids are kept for the retention; above a cap
	// (Options.MaxEarly) the oldest event goes first, counted in Stats;
	// outcomes of the ingress never go. Repeated equal facts count once, and of
	// events that differ in their detail alone the first MaxDetails: an API that
	// sends an event again and again must not make each cost more.
	//
	// The answer of an outcome is kept with the payload of its request, whether
	// that is known yet or not, and goes with it. Where the disk has no room but
	// the reserve, answers are left out, and the outcomes are kept.
	//
	// Errors: [ErrUnavailable]; [ErrFull] only when even the reserve is gone.
	Complete(ctx context.Context, facts []Fact) (errs []error, err error)
}

// Filter selects requests. Zero fields select everything.
type Filter struct {
	States     []capture.State `json:"states,omitempty"`
	Replayable bool            `json:"replayable,omitempty"` // failed, or received and past its grace
	Routes     []string        `json:"routes,omitempty"`
	Methods    []string        `json:"methods,omitempty"`
	// Path is a glob over the target's path as sent, without its query: "*"
	// stands for any bytes but "/", "**" for any bytes, "?" for one byte but "/".
	Path     string            `json:"path,omitempty"`
	Statuses capture.StatusSet `json:"statuses,omitempty"` // of the last attempt that has one
	Since    time.Time         `json:"since,omitzero"`     // received at or after
	Until    time.Time         `json:"until,omitzero"`     // received before
	IDs      []uuid.UUID       `json:"ids,omitempty"`
}

// Request is a request as the ledger lists it.
type Request struct {
	ID         uuid.UUID
	Seq        int64 // ledger insertion sequence
	State      capture.State
	Route      string
	Ingress    string
	Method     string
	Target     string // any bytes; not valid UTF-8 of necessity
	OrderKey   string
	Policy     capture.Policy
	Size       int64 // bytes of the body
	ReceivedAt time.Time
	RecordedAt time.Time
	// Status and Error are those of the last attempt that has ended; of several
	// results of it, of the one that counts most.
	Status   int
	Error    string
	Attempts int // how many are known, the first try included once its outcome is known
	// GraceEnd is when a received one becomes replayable.
	GraceEnd   time.Time // zero in every other state
	Replayable bool      // at the time of reading
	// PayloadExpired is true when head and body are gone (processed, past
	// KEEP_PROCESSED).
	PayloadExpired bool
}

// Detail is everything the ledger knows of one request but its payload.
type Detail struct {
	Request
	// Facts has each fact once, attempts by their numbers. The beginning of an
	// attempt is not in it once its end is known.
	Facts         capture.Facts
	EventTimes    []time.Time // when the ledger got to know Facts.Events[i]
	DiscardReason string
	DiscardedAt   time.Time
}

// Page is a part of a listing. Next is empty at the end.
type Page struct {
	Requests []Request
	Next     string
}

// Stats are maintained counts; reading them does not walk the requests.
type Stats struct {
	Requests         map[capture.State]int64
	Aside            map[string]int64 // by kind
	Early            int64            // facts about unknown ids
	EarlyDropped     int64            // events dropped above the cap, since the ledger was made
	Expired          int64            // requests deleted after the retention, since the ledger was made
	OldestReplayable time.Time        // received_at of the first one by id; zero when nothing is replayable
	PayloadBytes     int64            // of processed requests, the ones KEEP_PROCESSED_BYTES bounds
	FreeBytes        int64            // room on the disk, -1 when not known
	Replays          map[string]int64 // attempts of replay runs by result: processed, failed, rejected, unknown
}

// Ingress is what the ledger knows of an ingress by its last heartbeat, by the
// ledger's clock.
type Ingress struct {
	ID               string
	Start            string
	SeenAt           time.Time // the Unix epoch when only a capture of it is known
	Unreleased       int
	OldestUnreleased time.Time // zero when none
}

// Start is what the ledger knows of one process start of an ingress. Once
// everything that it had captured is released, Recorded and what was set aside
// of it are together at least Captured; less means that captures are lost. A
// start of which everything is recorded is forgotten when a later one of the
// same ingress is heard.
type Start struct {
	Ingress string
	ID      string
	// Captured is the highest count in its heartbeats: see
	// [capture.Heartbeat.Captured].
	Captured int64
	// Recorded is how many requests came into the ledger from its spool records,
	// since the ledger was made. Their expiry takes nothing off.
	Recorded int64
}

// Reader answers questions.
type Reader interface {
	// List gives requests in the order of their ids, which is the order of
	// receipt at each ingress. A request that matches throughout a paged listing
	// is in it exactly once, whatever is written meanwhile. limit is at most
	// 1000. Errors: [ErrInvalidCursor].
	List(ctx context.Context, f Filter, cursor string, limit int) (Page, error)
	// Get gives one request. Errors: [ErrNotFound].
	Get(ctx context.Context, id uuid.UUID) (Detail, error)
	// Payload gives head and body as they were captured. The body is read in
	// parts, never held whole when it came in chunks; the caller closes it.
	// Errors: [ErrNotFound], also when the payload has expired.
	Payload(ctx context.Context, id uuid.UUID) (head []byte, body io.ReadCloser, err error)
	// Answers gives what is kept of the answers to a request, those of its own
	// API first, by run and number; none where nothing is kept, or nothing of it
	// is known. Of a test system's answers, those of a run's last attempt are kept
	// until a run to another target that begins after its end has one.
	Answers(ctx context.Context, id uuid.UUID) ([]Answer, error)
	Stats(ctx context.Context) (Stats, error)
	// AsideList gives messages that were set aside, oldest first, without Data
	// above 64 KiB.
	AsideList(ctx context.Context, cursor string, limit int) ([]Aside, string, error)
	Ingresses(ctx context.Context) ([]Ingress, error)
	// Starts gives the process starts that are not forgotten, by ingress and id.
	Starts(ctx context.Context) ([]Start, error)
	// Runs gives runs, the newest first. Errors: [ErrInvalidCursor].
	Runs(ctx context.Context, cursor string, limit int) ([]Run, string, error)
	// Run gives one run. Errors: [ErrNotFound].
	Run(ctx context.Context, id string) (Run, error)
	// Now is the ledger's clock.
	Now(ctx context.Context) (time.Time, error)
}

// Answer is what is kept of the answer to one attempt.
type Answer struct {
	Attempt int
	Run     string // empty for the first try
	// Elsewhere is true when the run sent to another target: the answer is a test
	// system's.
	Elsewhere bool
	capture.Answer
}

// RunState is what a replay run is about.
type RunState string

const (
	RunActive    RunState = "active"    // somebody works on it, or it waits to be picked up
	RunFinished  RunState = "finished"  // it went through its whole selection
	RunCancelled RunState = "cancelled" // by an operator
)

// Run is a replay run.
type Run struct {
	ID     string // a UUIDv7, so that runs sort by age
	Filter Filter
	// Target is where it sends: empty for each request's own upstream, else
	// the URL of another system, in which case attempts change no state.
	Target    string
	MaxSeq    int64 // frozen: requests inserted later are not selected
	State     RunState
	CreatedAt time.Time
	UpdatedAt time.Time
	EndedAt   time.Time
	// Owner holds it until LeaseUntil.
	Owner      string
	LeaseUntil time.Time
	Counts     RunCounts
	Report     []byte // JSON, written when it ends
}

// RunCounts is a run's progress, maintained with every attempt.
type RunCounts struct {
	Sent      int64 `json:"sent"`
	Processed int64 `json:"processed"`
	Failed    int64 `json:"failed"`
	Rejected  int64 `json:"rejected"`
	Unknown   int64 `json:"unknown"` // answered, and no verdict yet: a completion event is awaited
	Skipped   int64 `json:"skipped"` // not begun: its state or lease did not allow it
}

// RunLease is the right to work on a run. Its token is a fencing token: it
// grows with every new holder, and a write under an older one gives
// [ErrFenced].
type RunLease struct {
	RunID string
	Owner string
	Token int64
}

// Candidate is a request that a run may send.
type Candidate struct {
	Request
	// Unresolved is true when the last attempt was begun and its end never
	// became known: whoever sent it died. It is sent alone, and no evidence.
	Unresolved bool
}

// BeginOptions bound what Begin may start.
type BeginOptions struct {
	// Lease is how long the leases hold; it outlasts the send timeout.
	Lease time.Duration
	// MaxAttempts is how many attempts of one request this run may make.
	MaxAttempts int
	// Order says by which key the requests keep their order.
	Order Order
	// Keys are the ordering keys where Order is OrderGiven: Keys[i] is that of
	// ids[i], empty where it has none. The route is part of every key without
	// being said.
	Keys []string
	// PastBlocked begins a request though an earlier one of its key is open.
	PastBlocked bool
}

// Order says by which key requests keep their order: those of one key are sent
// one at a time, by their ids. Keys are of one route, and of one target: what a
// run sends to another system is in nobody's way.
type Order string

const (
	// OrderCaptured orders by [Request.OrderKey]. Begin sees to it over all runs:
	// nothing is begun while an earlier request of its key is open, unless
	// BeginOptions.PastBlocked says so, and nothing, in any case, while a request
	// of its key is under a valid lease. A run to another target asks for leases
	// alone, since its attempts close nothing.
	OrderCaptured Order = ""
	// OrderGiven orders by BeginOptions.Keys. Begin sees to it that no two
	// requests of a key are under lease at the same time; which of them goes first
	// is the caller's business.
	OrderGiven Order = "given"
	// OrderNone keeps no order.
	OrderNone Order = "none"
)

// Begun is an attempt that was written down and may now be sent, or the reason
// why it may not.
type Begun struct {
	ID      uuid.UUID
	Skip    SkipReason // empty: begun
	Attempt int        // its number
	Token   int64      // the lease's fencing token
	Until   time.Time  // when the lease ends, by the ledger's clock
	// Expires is when the lease ends by this process's monotonic clock, never
	// later than Until.
	Expires time.Time
	// Head is what the request waits for where Skip is SkipBlocked: the first open
	// one of its key, or the one under lease.
	Head uuid.UUID
}

// SkipReason says why an attempt was not begun.
type SkipReason string

const (
	SkipState    SkipReason = "state"    // it is not selected any more: processed, discarded, in grace, …
	SkipLeased   SkipReason = "leased"   // another run has it
	SkipAttempts SkipReason = "attempts" // this run has no attempt left for it
	SkipPayload  SkipReason = "payload"  // its payload has expired
	SkipBlocked  SkipReason = "blocked"  // another request of its key comes first
)

// Ended is the result of an attempt.
type Ended struct {
	ID      uuid.UUID
	Token   int64
	Attempt capture.Attempt // Number and Run as begun
	Answer  *capture.Answer // kept as that of an outcome is; nil where none is to be kept
}

// TestResult is what a run to another target has with one request.
type TestResult struct {
	Request
	// Attempt is the last one of the run that has ended.
	Attempt capture.Attempt
}

// Replayer is what replay runs are made of.
//
// What a run may send: of what its filter selects, the failed ones, and the
// received ones whose grace is over; rejected ones if the filter names that
// state, or names no state and statuses or ids; quarantined ones if it names
// that state. Never what is discarded, and never what is in its grace. Processed
// ones only to another target, if the filter names that state and their payload
// is still there.
type Replayer interface {
	// OpenRun picks up the active run with the same filter and target whose
	// lease is over, the oldest first, or makes a new one with its selection
	// frozen at the ledger's last insertion sequence. picked tells which.
	OpenRun(ctx context.Context, f Filter, target, owner string, lease time.Duration) (r Run, l RunLease, picked bool, err error)
	// KeepRun extends the lease. It gives the run, so that the holder sees that
	// it was cancelled. Errors: [ErrFenced].
	KeepRun(ctx context.Context, l RunLease, lease time.Duration) (Run, error)
	// EndRun finishes it with its report; one that was cancelled stays
	// cancelled. Errors: [ErrFenced].
	EndRun(ctx context.Context, l RunLease, report []byte) error
	// LeaveRun gives the lease up, so that another process can pick the run up
	// at once. Errors: [ErrFenced].
	LeaveRun(ctx context.Context, l RunLease) error
	// CancelRun ends a run from outside. Errors: [ErrNotFound]; [ErrConflict]
	// when it has ended.
	CancelRun(ctx context.Context, id string) error

	// Select gives the requests of the run's frozen selection that match its
	// filter now and of which this run has attempts left, in the order of their
	// ids, after the given one (uuid.Nil: from the start).
	Select(ctx context.Context, l RunLease, maxAttempts int, after uuid.UUID, limit int) ([]Candidate, error)
	// Left counts what of the run's selection is still replayable, waits for its
	// grace or a lease, is rejected, or is quarantined. Rejected ones count if
	// the run has sent them or may send them: those of live traffic are not its
	// business. Quarantined ones count if they match the filter but for state
	// and status.
	Left(ctx context.Context, l RunLease) (Left, error)
	// Begin writes attempts down, before they are sent, in one transaction:
	// each requires a request that the run may still send, and no valid lease of
	// any run, this one's included: its sender may be paused, not dead; and what
	// [Order] says of its key. It gives a lease with a new fencing token. An attempt that a run to another target
	// begins changes no state, and such a run sends again only what failed
	// there. A cancelled or ended run begins nothing: [ErrFenced].
	// Errors: [ErrFenced].
	Begin(ctx context.Context, l RunLease, ids []uuid.UUID, o BeginOptions) ([]Begun, error)
	// Tested gives what a run to another target has with each request that it has
	// sent, in the order of their ids, after the given one (uuid.Nil: from the
	// start), at most limit. Requests that have expired since are left out.
	// Errors: [ErrNotFound].
	Tested(ctx context.Context, run string, after uuid.UUID, limit int) ([]TestResult, error)
	// End writes results and gives the leases back, in one transaction.
	// errs[i] is [ErrFenced] when that lease was lost to somebody else; a lease
	// that is over and was not taken is still good. A repeated equal result is
	// no error. The run's own lease is not asked for: what was sent was sent.
	End(ctx context.Context, l RunLease, results []Ended) (errs []error, err error)
}

// Left is what is left of a selection.
type Left struct {
	Replayable  int64 // would be sent now
	Waiting     int64 // open, in its grace or leased
	Rejected    int64
	Quarantined int64
}

// Operator is what people decide.
type Operator interface {
	// Discard gives up every unprocessed request that the filter selects, at
	// most limit in one call, in the order of ids, and says how many. A request
	// that is already discarded is not counted. Reason must not be empty.
	Discard(ctx context.Context, f Filter, reason string, limit int) (int, error)
	// Quarantine holds an open request back. Errors: [ErrNotFound], [ErrConflict]
	// when it is closed.
	Quarantine(ctx context.Context, id uuid.UUID, reason, detail string) error
	// ReleaseQuarantine lifts every quarantine of the request; it counts as
	// failed until a later attempt. Errors: [ErrNotFound]; [ErrConflict] when it
	// has none.
	ReleaseQuarantine(ctx context.Context, id uuid.UUID) error
}

// Retention says how long closed requests are kept. What is open never goes.
type Retention struct {
	KeepProcessed      time.Duration // payloads of processed ones
	KeepProcessedBytes int64         // and at most so many bytes of them, oldest first out
	Retention          time.Duration // everything of closed ones
}

// Keeper is housekeeping.
type Keeper interface {
	// Expire deletes what may go, at most limit requests in one call, so that
	// writers are not held up; more is true when there may be more to do. It
	// deletes payloads of processed requests, whole requests that are closed,
	// facts about ids that never became known, chunks whose head never came and
	// the memory of abandoned ones; deleted counts them all. Ages count from
	// when the ledger learnt what closed the request. What is set aside stays.
	Expire(ctx context.Context, r Retention, limit int) (deleted int, more bool, err error)
}
