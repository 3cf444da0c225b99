package sqlite

// applicationID stands in the file's header, so that a file of another program
// is never taken for a ledger: "hfld".
const applicationID = 0x68666c64

// schemaVersion is the file's user_version. A higher one is of a newer release.
const schemaVersion = 1 + len(migrations)

// pageSize is what suits rows of a kilobyte best: measured against 4 and
// 16 KiB, it takes a tenth less CPU for each request.
const pageSize = 8192

// Codes of states and verdicts in the file. They are part of the schema: those
// below open are open, those from closed on are closed, and the indexes say so
// with literals.
const (
	codeReceived = iota
	codeFailed
	codeQuarantined
	codeRejected
	codeDiscarded
	codeProcessed
)

// Values of requests.facts: where the facts of a request stand.
const (
	factsNone   = 0 // only the capture is known
	factsInline = 1 // one result of the first try, in the request's own row
	factsTables = 2 // in the tables attempts, events, quarantines, discards
)

// Values of assemblies.status: what became of a body in chunks.
const (
	assemblyChunks    = 0 // chunks are there, no head is known
	assemblyWaiting   = 1 // the head is there, chunks are missing
	assemblyComplete  = 2 // all there and whole: the request is known
	assemblyBroken    = 3 // all there, and not the body that the head announced
	assemblyAbandoned = 4 // no head will come
)

// Names in the table counters. Those with a colon are followed by a label.
const (
	counterSeq          = "seq"   // last insertion sequence
	counterToken        = "token" // last fencing token
	counterEarly        = "early"
	counterEarlyEvents  = "early_events"
	counterEarlyDropped = "early_dropped"
	counterExpired      = "expired"
	counterPayloadBytes = "payload_bytes"
	counterRequests     = "requests:"
	counterAside        = "aside:"
	counterReplays      = "replays:"
	// Of each process start of an ingress, "<ingress>/<start>".
	counterCaptured = "captured:" // what its heartbeats say
	counterRecorded = "recorded:" // requests that came from its spool records
)

// schema is the whole of a ledger of version 1; migrations lead on from there,
// also for a new one. Times are nanoseconds since 1970, NULL
// for an unknown one. Constraints have names, because their names are the
// reasons that people read when a row is refused.
const schema = `
CREATE TABLE requests (
  id BLOB NOT NULL PRIMARY KEY
    CONSTRAINT id_is_a_uuid_of_version_7 CHECK (length(id) = 16 AND substr(id, 7, 1) BETWEEN x'70' AND x'7f'),
  seq INTEGER NOT NULL,
  state INTEGER NOT NULL CONSTRAINT state_is_known CHECK (state BETWEEN 0 AND 5),
  kept INTEGER NOT NULL, -- 1: processed, and its payload is still there
  payload INTEGER NOT NULL, -- bytes of head and body, 0 when they are gone
  due INTEGER NOT NULL, -- end of the grace of a received one, else 0
  facts INTEGER NOT NULL,
  changed INTEGER NOT NULL, -- when the ledger last learnt something that counts
  origin INTEGER NOT NULL,
  method TEXT NOT NULL CONSTRAINT method_has_1_to_64_bytes CHECK (length(method) BETWEEN 1 AND 64),
  target BLOB NOT NULL CONSTRAINT target_is_not_empty CHECK (length(target) > 0),
  order_key BLOB,
  size INTEGER NOT NULL CONSTRAINT size_is_not_negative CHECK (size >= 0),
  received INTEGER NOT NULL,
  recorded INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  unresolved INTEGER NOT NULL, -- 1: the last attempt was begun, and its end is not known
  started INTEGER, -- from here on, the last attempt that has ended
  ended INTEGER,
  status INTEGER CONSTRAINT status_is_not_negative CHECK (status >= 0),
  error TEXT,
  verdict INTEGER,
  match_status INTEGER -- of the last attempt that has one; NULL: the same as status
) WITHOUT ROWID, STRICT;
CREATE INDEX requests_unprocessed ON requests (state, id, due) WHERE state <> 5;
CREATE INDEX requests_closed ON requests (kept, changed, payload) WHERE state >= 3;

CREATE TABLE payloads (
  seq INTEGER PRIMARY KEY,
  head BLOB NOT NULL CONSTRAINT head_is_not_empty CHECK (length(head) > 0),
  body BLOB -- NULL: in chunks
) STRICT;

-- What many requests have in common: route, ingress and policy.
CREATE TABLE origins (
  id INTEGER PRIMARY KEY,
  route TEXT NOT NULL,
  ingress TEXT NOT NULL,
  policy TEXT NOT NULL,
  grace INTEGER NOT NULL,
  UNIQUE (route, ingress, policy)
) STRICT;

CREATE TABLE attempts (
  id BLOB NOT NULL,
  number INTEGER NOT NULL CONSTRAINT attempt_is_a_number_from_1 CHECK (number >= 1),
  variant INTEGER NOT NULL, -- tells several results of one attempt apart
  run TEXT NOT NULL,
  started INTEGER,
  ended INTEGER,
  status INTEGER NOT NULL CONSTRAINT status_is_not_negative CHECK (status >= 0),
  error TEXT NOT NULL,
  verdict INTEGER NOT NULL,
  known INTEGER NOT NULL,
  PRIMARY KEY (id, number, variant)
) WITHOUT ROWID, STRICT;

CREATE TABLE events (
  id BLOB NOT NULL,
  number INTEGER NOT NULL,
  verdict INTEGER NOT NULL,
  attempt INTEGER NOT NULL CONSTRAINT attempt_is_a_number_from_1 CHECK (attempt >= 1),
  detail TEXT NOT NULL,
  known INTEGER NOT NULL,
  PRIMARY KEY (id, number)
) WITHOUT ROWID, STRICT;

CREATE TABLE quarantines (
  id BLOB NOT NULL,
  number INTEGER NOT NULL,
  reason TEXT NOT NULL,
  detail TEXT NOT NULL,
  at INTEGER NOT NULL,
  released INTEGER,
  released_after INTEGER NOT NULL,
  PRIMARY KEY (id, number)
) WITHOUT ROWID, STRICT;

CREATE TABLE discards (
  id BLOB NOT NULL PRIMARY KEY,
  reason TEXT NOT NULL,
  at INTEGER NOT NULL
) WITHOUT ROWID, STRICT;

-- Facts about requests whose capture has not come.
CREATE TABLE early (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id BLOB NOT NULL CONSTRAINT id_has_16_bytes CHECK (length(id) = 16),
  event INTEGER NOT NULL,
  attempt INTEGER NOT NULL CONSTRAINT attempt_is_a_number_from_1 CHECK (attempt >= 1),
  run TEXT NOT NULL,
  started INTEGER,
  ended INTEGER,
  status INTEGER NOT NULL CONSTRAINT status_is_not_negative CHECK (status >= 0),
  text TEXT NOT NULL, -- error of an attempt, detail of an event
  verdict INTEGER NOT NULL,
  known INTEGER NOT NULL
) STRICT;
CREATE INDEX early_id ON early (id);
CREATE INDEX early_events ON early (seq) WHERE event = 1;

-- Bodies above the inline limit, and what is known of the heads they belong to.
CREATE TABLE chunks (
  seq INTEGER PRIMARY KEY,
  id BLOB NOT NULL CONSTRAINT id_is_a_uuid_of_version_7 CHECK (length(id) = 16 AND substr(id, 7, 1) BETWEEN x'70' AND x'7f'),
  number INTEGER NOT NULL CONSTRAINT chunk_is_a_number_from_0 CHECK (number BETWEEN 0 AND 1048575),
  data BLOB NOT NULL CONSTRAINT chunk_is_not_empty CHECK (length(data) > 0),
  UNIQUE (id, number)
) STRICT;
CREATE TABLE assemblies (
  id BLOB NOT NULL PRIMARY KEY,
  status INTEGER NOT NULL,
  changed INTEGER NOT NULL,
  origin INTEGER,
  order_key BLOB,
  size INTEGER CONSTRAINT size_is_not_negative CHECK (size >= 0),
  received INTEGER,
  chunks INTEGER CONSTRAINT chunks_is_a_number_from_1 CHECK (chunks BETWEEN 1 AND 1048576),
  sha256 TEXT,
  head BLOB
) WITHOUT ROWID, STRICT;
CREATE INDEX assemblies_headless ON assemblies (changed) WHERE status IN (0, 4);
-- Spool records that wait for the rest of their request.
CREATE TABLE refs (
  id BLOB NOT NULL,
  ref TEXT NOT NULL,
  PRIMARY KEY (id, ref)
) WITHOUT ROWID, STRICT;

CREATE TABLE asides (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL,
  reason TEXT NOT NULL,
  subject TEXT NOT NULL,
  request BLOB,
  header BLOB,
  data BLOB,
  at INTEGER NOT NULL,
  fingerprint BLOB NOT NULL UNIQUE
) STRICT;

CREATE TABLE ingresses (
  id TEXT NOT NULL PRIMARY KEY,
  start TEXT NOT NULL,
  own INTEGER NOT NULL, -- the beat's time by the ingress's clock, to tell late ones
  seen INTEGER NOT NULL,
  unreleased INTEGER NOT NULL,
  oldest INTEGER
) WITHOUT ROWID, STRICT;

CREATE TABLE runs (
  id TEXT NOT NULL PRIMARY KEY,
  filter TEXT NOT NULL,
  target TEXT NOT NULL,
  max_seq INTEGER NOT NULL,
  state TEXT NOT NULL,
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL,
  ended INTEGER,
  owner TEXT NOT NULL,
  until INTEGER NOT NULL,
  token INTEGER NOT NULL,
  sent INTEGER NOT NULL DEFAULT 0,
  processed INTEGER NOT NULL DEFAULT 0,
  failed INTEGER NOT NULL DEFAULT 0,
  rejected INTEGER NOT NULL DEFAULT 0,
  unknown INTEGER NOT NULL DEFAULT 0,
  skipped INTEGER NOT NULL DEFAULT 0,
  report BLOB
) WITHOUT ROWID, STRICT;
CREATE INDEX runs_active ON runs (filter, target) WHERE state = 'active';

-- The right to send. The key is "id:<uuid>".
CREATE TABLE leases (
  key TEXT NOT NULL PRIMARY KEY,
  run TEXT NOT NULL,
  token INTEGER NOT NULL,
  until INTEGER NOT NULL
) WITHOUT ROWID, STRICT;

-- Attempts of runs to another target. They change no state.
CREATE TABLE target_attempts (
  run TEXT NOT NULL,
  id BLOB NOT NULL,
  number INTEGER NOT NULL,
  started INTEGER,
  ended INTEGER,
  status INTEGER NOT NULL,
  error TEXT NOT NULL,
  verdict INTEGER NOT NULL,
  PRIMARY KEY (id, run, number)
) WITHOUT ROWID, STRICT;

CREATE TABLE counters (
  name TEXT NOT NULL PRIMARY KEY,
  n INTEGER NOT NULL
) WITHOUT ROWID, STRICT;
`

// migrations[i] makes version i+2 of version i+1, in one transaction. A process
// of the version before may have the file open meanwhile, and goes on: columns
// are added with a default, and nothing that it uses goes away.
var migrations = [...]string{
	// Order within a key. The index holds open requests alone, and of those the
	// ones with a key: it costs the others nothing.
	`
CREATE INDEX requests_keyed ON requests (origin, order_key, id) WHERE order_key IS NOT NULL AND state < 3;
ALTER TABLE leases ADD COLUMN captured BLOB; -- ordering key of the request, with target and route
ALTER TABLE leases ADD COLUMN given BLOB; -- the one that the run orders by instead
CREATE INDEX leases_captured ON leases (captured) WHERE captured IS NOT NULL;
CREATE INDEX leases_given ON leases (given) WHERE given IS NOT NULL;
`,
	// Answers that routes keep, of requests that may not be known yet. They go
	// with the payload, and their bytes count among its.
	`
CREATE TABLE answers (
  id BLOB NOT NULL,
  run TEXT NOT NULL,
  number INTEGER NOT NULL,
  type TEXT NOT NULL,
  encoding TEXT NOT NULL,
  cut INTEGER NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (id, run, number)
) STRICT;
CREATE INDEX target_attempts_run ON target_attempts (run, id, number);
`,
}
