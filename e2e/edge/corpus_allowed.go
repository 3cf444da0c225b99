package edge

import (
	"slices"
	"strconv"
	"strings"
)

// Pair is what came of the same exchange with the API alone, and through the
// ingress: a request as the API saw it, and the answer as the client saw it.
type Pair struct {
	Direct, Got             Arrival
	DirectAnswer, GotAnswer Answer
}

// captured reports whether the ingress captures the request.
func (p Pair) captured() bool {
	return slices.Contains([]string{"POST", "PUT", "PATCH", "DELETE"}, p.Direct.Method)
}

// The parts of an exchange whose fields are compared.
const (
	InRequest         = "request"
	InRequestTrailers = "request trailers"
	InAnswer          = "answer"
	InAnswerTrailers  = "answer trailers"
)

// Difference is one that there must be, or may be, between what one side sent and what the
// other side got through the ingress. Fields that no Difference names have the
// same spelling, values and order on both sides.
type Difference struct {
	// Parts are where it may be.
	Parts []string
	// What says it in a word or two, and Why gives the reason.
	What, Why string
	// Names reports whether the difference may be in a field of this name, which
	// is in lower case.
	Names func(p Pair, name string) bool
	// Right reports whether these are the values of the field on the two sides
	// that there should be.
	Right func(p Pair, name string, direct, got []string) bool
	// Optional allows the same values on both sides, too. Otherwise one of the
	// differences that name the field must be right.
	Optional bool
	// Always are names to which this applies where neither side has the field.
	Always []string
	// Moves allows a field with the same values at another place.
	Moves bool
}

func names(list ...string) func(Pair, string) bool {
	return func(_ Pair, name string) bool { return slices.Contains(list, name) }
}

func removed(_ Pair, _ string, _, got []string) bool { return len(got) == 0 }

// meant is the name that CGI-like servers take a name for.
func meant(name string) string { return strings.ReplaceAll(name, "_", "-") }

// nominated reports whether a Connection field names the field.
func nominated(f Fields, name string) bool { return f.Has("Connection", name) }

var (
	inRequest = []string{InRequest}
	inAnswer  = []string{InAnswer}
	inHeads   = []string{InRequest, InAnswer}
)

var (
	framing    = []string{"content-length", "transfer-encoding"}
	hops       = []string{"connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "proxy-authenticate", "proxy-authorization"}
	forwarding = []string{"x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"}
	ours       = []string{"x-request-uuid", "x-request-stored", "x-request-replay", "x-request-attempt", "x-request-received-at"}
)

// Allowed are all differences that there may be. One that no exchange shows is
// an error, too.
func Allowed() []Difference {
	return []Difference{{
		Parts: inHeads, What: "hop-by-hop fields", Why: "they are meant for the ingress (RFC 9110 section 7.6.1)",
		Names: func(_ Pair, name string) bool { return slices.Contains(hops, meant(name)) }, Right: removed,
	}, {
		Parts: inAnswer, Optional: true, What: "Connection of its own", Why: "the ingress says what becomes of its own connection",
		Names: names("connection", "keep-alive"), Right: func(_ Pair, _ string, _, got []string) bool {
			return len(got) == 1 && (strings.EqualFold(got[0], "close") || strings.EqualFold(got[0], "keep-alive"))
		},
	}, {
		Parts: inRequest, Optional: true, What: "TE: trailers", Why: "the ingress takes trailers, and asks for them where the client does",
		Names: names("te", "connection"), Right: func(p Pair, name string, _, got []string) bool {
			return p.Direct.Fields.Has("TE", "trailers") && slices.Equal(got, map[string][]string{"te": {"trailers"}, "connection": {"TE"}}[name])
		},
	}, {
		Parts: inRequest, What: "fields that Connection names", Why: "so it is what the client asks for",
		Names: func(p Pair, name string) bool { return nominated(p.Direct.Fields, name) && name != "host" }, Right: removed,
	}, {
		Parts: inAnswer, What: "fields that Connection names", Why: "so it is what the API asks for",
		Names: func(p Pair, name string) bool { return nominated(p.DirectAnswer.Fields, name) }, Right: removed,
	}, {
		Parts: inRequest, What: "framing", Why: "captured bodies have been read whole; streamed ones keep theirs, in chunks of other sizes",
		Names: names(framing...), Right: requestFraming, Moves: true,
	}, {
		Parts: inAnswer, What: "framing", Why: "it belongs to the connection; short answers in chunks may get a length",
		Names: names(framing...), Right: answerFraming, Moves: true,
	}, {
		Parts: inRequest, What: "Expect", Why: "the ingress answers it itself, when it is ready for the body",
		Names: names("expect"), Right: removed,
	}, {
		Parts: inRequest, Optional: true, What: "no Host", Why: "where the client names none it is the API's",
		Names: names("host"), Right: func(p Pair, _ string, direct, got []string) bool {
			return strings.Join(direct, "") == "" && len(got) == 1 && got[0] != ""
		},
	}, {
		Parts: inRequest, Optional: true, What: "Host's place and spelling", Why: "it comes first, as RFC 9110 section 7.2 recommends",
		Names: names("host"), Right: func(_ Pair, _ string, direct, got []string) bool { return slices.Equal(direct, got) }, Moves: true,
	}, {
		Parts: inRequest, What: "Content_Length, Transfer_Encoding", Why: "CGI-like servers take _ for -, and would believe them",
		Names: func(_ Pair, name string) bool {
			return strings.Contains(name, "_") && slices.Contains(framing, meant(name))
		}, Right: removed,
	}, {
		Parts: inRequest, Always: []string{"via"}, What: "Via", Why: "a gateway adds itself (RFC 9110 section 7.6.3)",
		Names: names("via"), Right: func(p Pair, _ string, direct, got []string) bool {
			version := strings.TrimPrefix(p.Direct.Version, "HTTP/")
			if nominated(p.Direct.Fields, "via") {
				direct = nil
			}
			return appended(direct, got, "1.1 holdfast") || appended(direct, got, version+" holdfast")
		},
	}, {
		Parts: inAnswer, Always: []string{"via"}, What: "Via", Why: "a gateway adds itself",
		Names: names("via"), Right: func(p Pair, _ string, direct, got []string) bool {
			version := strings.TrimPrefix(p.DirectAnswer.Version, "HTTP/")
			return appended(direct, got, "1.1 holdfast") || appended(direct, got, version+" holdfast")
		},
	}, {
		Parts: inRequest, Always: forwarding, What: "X-Forwarded-For, -Host, -Proto", Why: "the ingress says who the client is; a stranger's word for it is dropped",
		Names: names(forwarding...), Right: func(p Pair, name string, _, got []string) bool {
			want := map[string]string{"x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "http"}
			if host := p.Direct.Fields.Values("Host"); len(host) == 1 {
				want["x-forwarded-host"] = host[0]
			} else if strings.Contains(p.Direct.Target, "://") {
				want["x-forwarded-host"] = Authority
			}
			if want[name] == "" {
				return len(got) == 0 || len(got) == 1 && got[0] == ""
			}
			return len(got) == 1 && strings.EqualFold(got[0], want[name])
		},
	}, {
		Parts: inRequest, What: "Forwarded, X-Forwarded-Port, X-Real-IP", Why: "as above, and the ingress has nothing to say in them",
		Names: func(_ Pair, name string) bool {
			return slices.Contains([]string{"forwarded", "x-forwarded-port", "x-real-ip"}, meant(name))
		}, Right: removed,
	}, {
		Parts: inRequest, Always: []string{"x-request-uuid"}, What: "the UUID", Why: "the ingress gives every request one; a client's own is dropped",
		Names: names("x-request-uuid"), Right: func(p Pair, _ string, _, got []string) bool {
			return len(got) == 1 && IsUUIDv7(got[0]) && slices.Equal(p.GotAnswer.Fields.Values("X-Request-UUID"), got)
		},
	}, {
		Parts: inRequest, What: "our own fields, from outside", Why: "only the ingress may set them; CGI-like servers take _ for -",
		Names: func(_ Pair, name string) bool { return slices.Contains(ours, meant(name)) && name != "x-request-uuid" }, Right: removed,
	}, {
		Parts: inAnswer, What: "our own fields, from the API", Why: "only the ingress may set them",
		Names: func(_ Pair, name string) bool {
			return slices.Contains(ours, meant(name)) && name != "x-request-uuid" && name != "x-request-stored"
		}, Right: removed,
	}, {
		Parts: []string{InRequestTrailers, InAnswerTrailers}, What: "our own fields, in trailers", Why: "nobody sets them there",
		Names: func(_ Pair, name string) bool { return slices.Contains(ours, meant(name)) }, Right: removed,
	}, {
		Parts: inAnswer, Always: []string{"x-request-uuid"}, What: "the UUID", Why: "the client may ask for what became of the request",
		Names: names("x-request-uuid"), Right: func(p Pair, _ string, _, got []string) bool {
			return len(got) == 1 && slices.Equal(p.Got.Fields.Values("X-Request-UUID"), got)
		},
	}, {
		Parts: inAnswer, Always: []string{"x-request-stored"}, What: "X-Request-Stored", Why: "the client is told that a captured request is stored",
		Names: names("x-request-stored"), Right: func(p Pair, _ string, _, got []string) bool {
			if !p.captured() {
				return len(got) == 0
			}
			return len(got) == 1 && got[0] == "synced"
		},
	}, {
		Parts: inAnswer, Always: []string{"date"}, What: "Date", Why: "a gateway adds one where there is none (RFC 9110 section 6.6.1)",
		Names: names("date"), Right: func(_ Pair, _ string, direct, got []string) bool {
			return len(got) == 1 && (len(direct) == 0 || slices.Equal(direct, got))
		},
	}, {
		Parts: []string{InRequestTrailers, InAnswerTrailers}, What: "framing and routing in trailers", Why: "nobody may believe them there (RFC 9110 section 6.5.1)",
		Names: names("content-length", "transfer-encoding", "host"), Right: removed,
	}}
}

// appended reports whether got is direct and one more element of the list.
func appended(direct, got []string, element string) bool {
	return strings.Join(append(slices.Clone(direct), element), ", ") == strings.Join(got, ", ")
}

// requestFraming says how a body may be framed for the API, given how it was
// framed by the client.
func requestFraming(p Pair, name string, _, _ []string) bool {
	lengths, codings := p.Got.Fields.Values("Content-Length"), p.Got.Fields.Values("Transfer-Encoding")
	asLength := len(codings) == 0 && len(lengths) == 1 && lengths[0] == strconv.Itoa(len(p.Direct.Body))
	asChunks := len(lengths) == 0 && slices.Equal(codings, []string{"chunked"})
	switch p.Direct.Framing {
	case None:
		return len(lengths)+len(codings) == 0 || asLength
	case Length:
		return asLength
	default:
		if p.captured() && len(p.Got.Trailers) == 0 {
			return asLength
		}
		return asChunks
	}
}

// answerFraming says how an answer may be framed for the client, given how it
// was framed by the API.
func answerFraming(p Pair, name string, direct, got []string) bool {
	a := p.GotAnswer
	lengths, codings := a.Fields.Values("Content-Length"), a.Fields.Values("Transfer-Encoding")
	if a.Framing == None { // no body, whatever is said
		if name == "transfer-encoding" {
			return len(got) == 0 || slices.Equal(direct, got)
		}
		return slices.Equal(direct, got) || a.Status == 204 && len(got) == 0
	}
	asLength := len(codings) == 0 && len(lengths) == 1 && lengths[0] == strconv.Itoa(len(p.DirectAnswer.Body))
	asChunks := len(lengths) == 0 && slices.Equal(codings, []string{"chunked"})
	old := p.Direct.Version == "HTTP/1.0"
	switch p.DirectAnswer.Framing {
	case Length:
		return asLength
	default:
		return asLength || asChunks && !old || old && len(lengths)+len(codings) == 0
	}
}

// IsUUIDv7 reports whether s is a UUID such as the ingress makes them.
func IsUUIDv7(s string) bool {
	if len(s) != 36 || s[14] != '7' {
		return false
	}
	for i := range len(s) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (s[i] == '-') || !dash && !strings.ContainsRune("0123456789abcdef", rune(s[i])) {
			return false
		}
	}
	return true
}

// Key names the difference.
func (d Difference) Key() string { return strings.Join(d.Parts, ", ") + ": " + d.What }
