// Package recorder takes what the requests stream carries into the ledger, and
// lets people read the ledger.
//
// # From the stream to the ledger
//
// Messages are taken in batches. A batch is committed, then the ingresses get
// the words that release their spool records, then the messages are
// acknowledged: whoever is killed in between is followed by somebody to whom
// the same messages come again, and for whom the ledger says that they are
// there. What cannot be decoded, or is refused by the ledger for its data, is
// set aside there with the reason and terminated; it earns its word too, and
// holds up nothing. As long as the ledger is full or unavailable nothing is
// acknowledged: the batch is tried again, and the rest waits in stream and
// spools.
//
// # Housekeeping
//
// The recorder keeps the heartbeats of the ingresses in the ledger, for the
// fence of the replayer; expires what may go; trims its stream; and shows the
// ledger's counts as metrics. Several recorders may run: they share the durable
// consumer, and each does all of the housekeeping, which does no harm.
//
// # The read API
//
//	GET /v1/requests            state, route, method, path, status, since, until, limit, cursor
//	GET /v1/requests/{id}       with its attempts, events, quarantines and headers
//	GET /v1/requests/{id}/http  the message as it was captured
//	GET /v1/runs                limit, cursor
//	GET /v1/runs/{id}           with its report
//	GET /v1/stats
//	GET /v1/aside               limit, cursor
//
// Parameters are given once; an empty one counts as not given, and an unknown
// one is refused. state, route, method and status take lists with commas.
// since and until are RFC 3339, or a duration back from the ledger's now, such
// as 90m. Errors are RFC 9457 problems that name the parameter at fault and say
// what is allowed.
//
// Times are RFC 3339 in UTC. Bytes that are not valid UTF-8, which targets and
// header values may hold, are shown percent-encoded; /http gives the exact
// bytes.
//
// The values of Authorization, Proxy-Authorization and Cookie are shown only to
// whoever has presented the token. Where the API asks for no token nobody has,
// and they read "[redacted]". Lists never show them.
package recorder
