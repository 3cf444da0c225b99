// Package route says what is decided about requests: by a file, or by the
// settings of the default route.
//
// # Which route
//
// The most specific route that takes the method decides. Hosts come first: one
// with a port, then one without, then wildcards from the longest, then routes
// without hosts. Among those of one host an exact path comes first, then the
// longest prefix, then routes that name methods before those that do not. A
// route that does not take the method is passed over. Two routes that would be
// equal are an error of the file, so its order does not matter.
//
// Paths are compared after the normalisation of RFC 3986 section 6.2.2, because
// that is what the API may make of them: percent-encoded letters, digits and
// -._~ are decoded, other percent-encodings are written with capitals, bytes
// that may not stand in a path are percent-encoded, and dot segments are
// removed. %2F stays apart from /, and // from /. What is forwarded is the
// target as the client sent it.
package route
