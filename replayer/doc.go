// Package replayer sends captured requests to the API again until it has
// processed them. It is a command, and the same binary as a Kubernetes Job.
//
// # A run
//
// A run is a row in the ledger: a filter and a selection frozen when it was
// made, which was behind a passage of the fence, too. It goes through the
// selection in passes, in the order of the ids:
//
//  1. The fence: whatever the API, or an ingress, had said about requests when
//     the passage began has reached the ledger. Nothing is sent long after one;
//     see [Fence]. The next passage runs while the present page is sent.
//  2. Select: what matches the filter now and has attempts left.
//  3. Begin: the attempt is written to the ledger, under a lease that outlasts
//     the send timeout, in the transaction that checks that the request is still
//     to be sent.
//  4. Send, once: the bytes that were captured, by [upstream.Pool], which
//     repeats nothing, follows nothing and parses no request. General clients
//     were not used because they tidy up: fasthttp takes cookies apart and keeps
//     the last of repeated User-Agent or Content-Type fields, net/http refuses
//     targets with control bytes and makes "//a" an absolute one.
//  5. End: the result is written under the lease's fencing token.
//
// Each request goes to the API of its route, by name. One whose route is gone is
// left alone, and counted in the report. An API that cannot be reached, or asks
// to wait, holds up its own requests alone: they are passed over, and the run
// waits for it once there is nothing else to send.
//
// # Order
//
// A pass holds a queue for each ordering key. What may go is the first of each
// that is not in flight, and whatever has no key; the ledger sees to it over all
// runs. A key stops, for the pass, at the first request that is not closed.
//
// # Killers
//
// Requests during which the API seemed to die, though it was well before, are
// sent alone, each behind a probe. Two such deaths that are the request's own
// doing, by what the probe or the next success says, put it into quarantine.
//
// # Pace
//
// How much is in flight to an API begins with one, doubles with each round of
// answers, is halved by refusals for load and missing answers, and held while
// answers are slow.
//
// # Attempts
//
// What failed is tried again in the next pass, after a delay that doubles, up to
// the limit of attempts.
//
// # What is not promised
//
// Delivery is at least once: an attempt whose end could not be written (a kill,
// a ledger that is gone) may have reached the API, and is made again, alone,
// when its lease is over. A completion event that becomes durable after a passage
// of the fence began may come too late to keep a request from being sent.
//
// Order is promised among what replays send; live traffic is not held back.
// Suspicion lives in memory: a run that is killed forgets it. Two runs to one API
// may hold each other's killers for their own suspects' doing.
//
// [upstream.Pool]: https://pkg.go.dev/github.com/holdfast-io/holdfast/pkg/upstream#Pool
package replayer
