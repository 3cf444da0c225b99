// Package wire reads HTTP/1.1 messages as they stand on the wire (RFC 9112):
// heads with their fields in order and as they were spelled, and bodies by their
// framing.
//
// The gateway stores, forwards and sends again the bytes that a client sent. It
// must therefore see them before a general HTTP library has put them into a map,
// and it must never take a message for something else than the API behind it
// does: whatever two readers could understand differently is refused.
//
// Requests are read strictly, and each refusal names the status that answers it.
// Answers are read as a proxy has to (RFC 9112 sections 2.2, 5.1 and 5.2): lone
// LF as line ends, folded lines and spaces before the colon are understood, and
// never passed on.
package wire
