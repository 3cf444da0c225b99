// Package compare shows test replays on real processes: answers that routes keep
// on their way into the ledger, and a test system that answers otherwise.
package compare
