package capture

import (
	"regexp"
	"strings"
)

// Names of streams and durable consumers.
const (
	RequestsStream    = "HOLDFAST_REQUESTS"
	CompletionsStream = "HOLDFAST_COMPLETIONS"
	RecorderDurable   = "recorder"
	AckerDurable      = "acker"
)

// Subjects that the streams store, and the wildcard subject of heartbeats.
const (
	RequestsSubjects    = "holdfast.requests.>"
	CompletionsSubjects = "holdfast.completions.>"
	HeartbeatSubjects   = "holdfast.ingress.*"
)

// NATS header names. They are written by the gateway alone.
const (
	// HeaderID carries the UUID of the request that a message belongs to.
	HeaderID = "Holdfast-Id"
	// HeaderCapture carries the parameters of a capture, a chunk or an abandon
	// record, as "v=1; name=value; …".
	HeaderCapture = "Holdfast-Capture"
	// HeaderSpool names the spool records that the message was published from,
	// as "<ingress>/<start>/<index>,…": whoever makes the message durable says so
	// to that ingress. It is one record, but for outcomes, several of which share
	// a message.
	HeaderSpool = "Holdfast-Spool"
	// HeaderVersion is the version of the message's form. Absent means 1.
	HeaderVersion = "Holdfast-Version"
)

// HTTP header names that the gateway sets towards the API and the client.
const (
	HTTPHeaderID         = "X-Request-UUID"
	HTTPHeaderStored     = "X-Request-Stored"
	HTTPHeaderReplay     = "X-Request-Replay"
	HTTPHeaderAttempt    = "X-Request-Attempt"
	HTTPHeaderReceivedAt = "X-Request-Received-At"
)

// OwnHTTPHeaders lists the header names that only the gateway may set. A value
// from outside is dropped in every spelling: see [IsOwnHTTPHeader].
var ownHTTPHeaders = map[string]struct{}{
	"x-request-uuid":        {},
	"x-request-stored":      {},
	"x-request-replay":      {},
	"x-request-attempt":     {},
	"x-request-received-at": {},
}

// IsOwnHTTPHeader reports whether name is one of the gateway's own header
// names in any spelling: letter case, and "_" for "-", which CGI-like servers
// treat alike (RFC 3875 section 4.1.18).
func IsOwnHTTPHeader(name string) bool {
	// All own names begin so; most headers are decided by their first byte.
	if len(name) < len("x-request-") || name[0]|0x20 != 'x' {
		return false
	}
	_, own := ownHTTPHeaders[strings.ReplaceAll(strings.ToLower(name), "_", "-")]
	return own
}

// DefaultRoute is the route's name when no routes file is used. UnknownRoute
// stands in subjects where the route is not known.
const (
	DefaultRoute = "default"
	UnknownRoute = "_"
)

var (
	routeName   = regexp.MustCompile(`^[a-z0-9_-]{1,32}$`)
	ingressName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
)

// ValidRoute reports whether name may name a route: [a-z0-9_-]{1,32}, and not
// the placeholder "_".
func ValidRoute(name string) bool { return routeName.MatchString(name) && name != UnknownRoute }

// ValidIngress reports whether id may name an ingress. It becomes one token of
// a NATS subject, hence [A-Za-z0-9_-]{1,64}.
func ValidIngress(id string) bool { return ingressName.MatchString(id) }

// IngressFromHost makes an ingress id of a host name: bytes that a subject
// token must not hold become "_", and what is too long is cut.
func IngressFromHost(host string) string {
	id := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_':
			return r
		}
		return '_'
	}, host)
	return id[:min(len(id), 64)]
}

// RequestSubject is the subject of a capture, its chunks and its abandon
// record. Methods other than [A-Z]+ become OTHER, so that no byte of a
// client's can shape a subject.
func RequestSubject(route, method string) string {
	return "holdfast.requests." + route + "." + subjectMethod(method)
}

// OutcomeSubject is the subject of the gateway's own word about attempts.
func OutcomeSubject(route string) string { return "holdfast.completions." + route + ".outcome" }

// EventSubject is the subject of the API's completion events.
func EventSubject(route string) string { return "holdfast.completions." + route + ".event" }

// CommittedSubject is the core subject of the words that release spool records
// of one ingress.
func CommittedSubject(ingress string) string { return "holdfast.committed." + ingress }

// HeartbeatSubject is the core subject of one ingress's heartbeats.
func HeartbeatSubject(ingress string) string { return "holdfast.ingress." + ingress }

// RouteOfSubject returns the route in a subject of either stream, UnknownRoute
// when there is none.
func RouteOfSubject(subject string) string {
	tokens := strings.SplitN(subject, ".", 4)
	if len(tokens) != 4 || tokens[0] != "holdfast" || tokens[2] == "" {
		return UnknownRoute
	}
	return tokens[2]
}

// IsOutcomeSubject and IsEventSubject tell the gateway's word from the API's.
func IsOutcomeSubject(subject string) bool { return isCompletionSubject(subject, ".outcome") }

// IsEventSubject reports whether subject carries completion events of the API.
func IsEventSubject(subject string) bool { return isCompletionSubject(subject, ".event") }

func isCompletionSubject(subject, kind string) bool {
	route, ok := strings.CutPrefix(subject, "holdfast.completions.")
	if !ok {
		return false
	}
	route, ok = strings.CutSuffix(route, kind)
	return ok && route != "" && !strings.Contains(route, ".")
}

func subjectMethod(method string) string {
	if method == "" || len(method) > 32 {
		return "OTHER"
	}
	for i := range len(method) {
		if method[i] < 'A' || method[i] > 'Z' {
			return "OTHER"
		}
	}
	return method
}
