// Package completion tells Holdfast that an API has processed a request.
//
// Holdfast puts X-Request-UUID on every request that it passes to the API.
// Under "COMPLETION=event" a request counts as processed only when the API
// says so, by that UUID; until then it stays replayable and comes again with
// the same UUID. Under "COMPLETION=response", the default, no such word is
// needed, but it counts as well.
//
// [Client] carries the word to the acker's HTTP API in batches, in the
// background, and never makes the API's answer wait. [Middleware] derives it
// from the handler's answer. A handler that finishes its work later takes the
// request over with [Hold] and reports by itself.
//
// What is lost here (a full queue, an acker that is away for too long, a kill
// of the API) is only ever the confirmation, never the request: it stays
// replayable, and the API meets its UUID once more. An API that stores the
// UUID in the transaction of its own write recognises it and reports it as
// processed again.
//
// The package uses the standard library only.
package completion
