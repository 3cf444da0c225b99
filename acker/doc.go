// Package acker is the service that commits what became of requests: the
// gateway's outcomes and the API's completion events, from the completions
// stream and over HTTP.
//
// # From the stream
//
// A batch is committed to the ledger, then the spool records of its outcomes are
// released by a word to their ingress, then it is acknowledged. What is
// malformed, and what the ledger cannot take, is set aside (kind "completion")
// and terminated: it never blocks what comes after it. A message on an event's
// subject is the API's whatever it looks like: it is never taken for an outcome,
// and releases no spool record.
//
// # Over HTTP
//
//	POST   /v1/completions        one event, an array of events, or one a line
//	PUT    /v1/completions/{id}   no body, or an event's fields
//	DELETE /v1/requests/{id}      the same as a bare PUT
//
// The answer is 202 once the ledger has committed, so a completion that was
// accepted survives kill -9 and power loss. Unknown ids are welcome: a completion
// may come before its request. Requests of concurrent callers share a commit.
//
// A body is judged by what it holds: Content-Type is not looked at, because
// curl -d sends a form's. A Content-Encoding is refused (415), an unknown query
// parameter or a malformed event too (400, with the position of the event and
// the field at fault), and nothing of the request is then committed.
package acker
