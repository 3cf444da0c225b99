// Package ingress is the service that clients talk to. It gives every request a
// UUID, writes it to the spool while it proxies it to the API, holds the answer
// until the capture is durable, and publishes what is in the spool to the
// streams in the background.
//
// # The order of durable steps
//
//  1. Before the API sees a byte: limits are checked, and room for the head, the
//     body and the outcome is reserved in the spool. A body of unknown length is
//     read in full first.
//  2. The capture is appended to the spool and the request is forwarded, side by
//     side. It is sent once, and not cancelled because the client left.
//  3. The answer is held until the capture is fsynced.
//  4. The outcome is decided at the end of the API's answer, and written (not
//     fsynced) before the last byte of the answer goes to the client.
//  5. If storing fails after the API has begun, its own answer passes, marked as
//     not stored, where its status decides; everything else is a reset
//     connection.
//
// # What fails, and what follows
//
//	no room (limit, disk)         503 and Retry-After before the API sees a byte;
//	                              with capture best_effort proxied, stored: no
//	body too large                413 before the API sees a byte
//	client breaks off in the body not forwarded as whole; its chunks are abandoned
//	API refuses the connection    502, or 202 with on_failure accept; captured
//	API resets or cuts its answer the same; after the answer has begun: reset
//	API is too slow               504, or 202
//	fsync fails                   the API's 2xx, 3xx or 4xx with stored: no under
//	                              completion response, else a reset connection
//	writing the outcome fails     the answer passes; the request stays replayable
//	NATS away                     nothing, until the spool is full
//	killed at any point           the next start publishes what is in the spool
package ingress
