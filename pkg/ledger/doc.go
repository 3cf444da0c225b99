// Package ledger is the contract of the store that knows what became of every
// captured request. Stores live below it, one package a technology; ledgertest
// holds the conformance suite that all of them pass.
//
// # Facts
//
// A ledger keeps facts and derives the state from them with
// [capture.Facts.State] in the transaction that adds a fact, so that any order
// and repetition of calls ends in the same state. Every method is idempotent by
// request id. Facts about ids whose capture has not come are kept and take
// effect when it does.
//
// # Durability
//
// When a method that writes returns without error, what it wrote survives
// kill -9 and power loss. When it returns an error of the whole call, nothing
// of it was written, unless the error says that this is unknown (a commit whose
// answer was lost); repeating it is always safe.
//
// # Batches
//
// Where a batch fails on the data of some items, those are found and refused
// one by one in the results, and all others are held. An error that has nothing
// to do with data (busy, full, gone) fails the whole call and refuses nothing.
//
// # Time
//
// Grace and leases are decided by the ledger's own clock alone: that of the
// process for an embedded store, the server's for a database.
//
// # Concurrency
//
// All methods are safe for concurrent use by goroutines and by processes.
package ledger
