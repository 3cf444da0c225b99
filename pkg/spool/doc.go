// Package spool is a durable journal of opaque records: they are appended,
// made durable by group commit, read in order by a publisher, and released one
// by one, in any order, by whoever has made them durable elsewhere.
//
// # Files
//
// A spool owns one directory, under an exclusive lock. Segments are files of
// fixed size whose blocks are allocated before the first record is promised to
// them; a segment gets its name only after its header is durable, so a segment
// without a valid header is damage, never a crash. Released segments are
// recycled, because overwriting allocated blocks makes fdatasync cheap.
//
// Every record carries the random salt of its segment, so that bytes left in a
// recycled file never pass for records, and the synced watermark: the segment
// and offset below which everything was known to be durable when the record
// was appended. Bytes that are invalid above every watermark of their process
// start are what a crash may legally leave; bytes below one are damage.
//
// # Guarantees
//
// A record for which [Spool.WaitSynced] returned nil survives power loss. A
// record for which [Reservation.AppendWritten] returned nil survives the death
// of the process, not that of the machine. A record is read again after every
// restart until it is released; releases are not persisted, so a record that
// was released may be read again after a restart, too.
//
// Blocks are promised as far as the file system keeps fallocate's word: a
// copy-on-write or thin volume may still refuse a write, which then fails like
// any other disk error.
package spool
