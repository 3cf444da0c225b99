// Package verify shows `replayer verify` on real processes: a system in use
// verifies, and each kind of damage, done by hand, is named with its ids.
package verify
