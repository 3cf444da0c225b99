// Package edge holds what the tests of the ingress as an HTTP gateway share: an
// API that tells what reached it, byte for byte, and the corpus of exchanges.
// The tests run real processes and speak to them as clients do, some of them
// badly.
package edge
