// Package capture is the vocabulary that the services share: the request, the
// facts that arrive about it, the state that follows from them, and the
// messages in which all of this travels.
//
// The package knows no technology. It imports the standard library and
// google/uuid only; streams, spools and ledgers are built on it, never the
// other way round.
//
// # The life of a request
//
// Facts about one request arrive in any order and any number: its capture, the
// attempts to have the API process it, completion events of the API, and an
// operator's word. [Facts.State] computes the state from the set of facts, so
// that order and repetition make no difference.
//
// # Messages
//
// A capture is a message on holdfast.requests.<route>.<METHOD> whose data is
// the request as an HTTP/1.1 message (RFC 9112). A body above the inline limit
// travels before it as chunks on the same subject. An outcome (the gateway's
// word about an attempt) and an event (the API's word) are JSON on
// holdfast.completions.<route>.outcome and .event. What the gateway has to say
// about a capture stands in the NATS header Holdfast-Capture; no header of a
// client's ever becomes a NATS header.
package capture
