// Package edge serves clients. It speaks HTTP/1.1 by its own strict reading
// (see [wire]), because the bytes of a request are what the gateway stores and
// sends, and HTTP/2 over TLS by net/http. Both come to the [Handler] as an
// [Exchange].
//
// A bad client costs its connection and never the service:
//
//	what is not valid HTTP        Handler.Refuse answers, the connection is closed
//	too slow with its head        408, closed
//	too slow with its body        Exchange.Read fails with os.ErrDeadlineExceeded
//	too slow to read the answer   Exchange.Write fails, the connection is reset
//	idle for too long             closed
//	one connection too many       503, closed
//	a panic of the handler        500 or a reset connection; logged and counted
//
// Idle connections hold no buffer. A stop goes on serving for DrainDelay, then
// closes what is idle, and waits for what is under way.
package edge
