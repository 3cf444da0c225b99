// Package exchange takes captured requests out of the ledger in forms that other
// tools read, and requests of other tools into it.
//
// # Out
//
// [Export] walks a selection in the order of ids and hands one [Item] at a time to
// a [Writer]: [NewHAR], [NewCurl], [NewVegeta] or [NewRaw]. A body is read whole,
// into a temporary file where it is large, before any byte of its request is
// written, so that one that is cut is known to be so; memory does not depend on
// how many requests there are, nor on the size of their bodies.
//
// Every request that is selected is in exactly one [Result]: whole, marked in the
// output as incomplete, or left out of it, with the reason. What is written is
// the request as it was captured, with its X-Request-UUID, so that an API that
// knows it already can tell. Authorization and Cookie values are replaced unless
// asked for; secrets in other places are not recognised.
//
// # In
//
// [Import] reads HAR ([NewHARReader]) or goreplay's files ([NewGorReader]) and
// records their requests as captured ones, framed anew and without what ends at
// a hop, by the rules of the gateway. An item that is not whole is refused by its
// number in the file, and the others are taken.
//
// The id of an imported request is made of its content and its own time, so the
// same file, imported again, makes no second request as long as the ledger keeps
// the first. It sorts where the request belongs by its time: in a replay,
// imported and captured requests of one ordering key go in the order in which
// clients sent them, as far as clocks agree.
package exchange
