// Package exampleapi is an API to put behind Holdfast: for trying it out, for
// the demo, and for the tests that break things. It is honest: it stores each
// request and its X-Request-UUID in one durable transaction before it answers,
// recognises a UUID that comes again, and keeps a record of its own of every
// arrival, so that a test can judge Holdfast by what the API saw.
//
// POST, PUT, PATCH and DELETE to any path store the request and answer 201 with
// {"seq":…,"id":…}. A UUID that is stored already gets the same answer and no
// second row. GET answers
//
//   - / with the name of the service,
//   - /stats with [Stats],
//   - /rows?after=&limit= with the stored [Row]s after a seq, bodies left out,
//   - /arrivals?after=&limit= with the [Arrival]s after a seq.
//
// It fails on request: see [Options]. It has no access control and is not meant
// for anything but tests.
package exampleapi
