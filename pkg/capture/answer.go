package capture

import (
	"encoding/base64"
	"strings"
)

// MaxAnswer is the most bytes of one answer that may be kept: with its coding it
// fits a message of 1 MiB, the broker's default.
const MaxAnswer = 512 << 10

// maxAnswerField bounds what is kept of a header field of an answer.
const maxAnswerField = 256

// Answer is what is kept of the body of an API's answer.
type Answer struct {
	Type     string `json:"type,omitempty"`     // Content-Type as sent, at most 256 bytes
	Encoding string `json:"encoding,omitempty"` // Content-Encoding as sent, at most 256 bytes
	// Cut says that Body is not all of it: the API sent more than the route keeps,
	// or its answer did not come whole.
	Cut  bool   `json:"cut,omitempty"`
	Body []byte `json:"body"` // at most [MaxAnswer] bytes, in the coding that Encoding names
}

// NewAnswer begins an answer without a body. What is beyond 256 bytes of a field
// is left out.
func NewAnswer(contentType, encoding string) *Answer {
	clip := func(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxAnswerField)], "\uFFFD") }
	return &Answer{Type: clip(contentType), Encoding: clip(encoding), Body: []byte{}}
}

// Keep adds a part of the body, as long as it has not more than most bytes; what
// is left out marks the answer as cut.
func (a *Answer) Keep(part []byte, most int) {
	room := most - len(a.Body)
	if len(part) > room {
		part, a.Cut = part[:max(room, 0)], true
	}
	a.Body = append(a.Body, part...)
}

// AnswerRoom is the most bytes that an answer with so many bytes of body adds to
// [Outcome.AppendJSON]: its two fields escaped, and the body in base64.
func AnswerRoom(body int) int {
	if body <= 0 {
		return 0
	}
	return 128 + 2*6*maxAnswerField + base64.StdEncoding.EncodedLen(body)
}

func (a *Answer) appendJSON(dst []byte) []byte {
	dst = append(dst, '{')
	if a.Type != "" {
		dst = append(appendString(append(dst, `"type":`...), a.Type), ',')
	}
	if a.Encoding != "" {
		dst = append(appendString(append(dst, `"encoding":`...), a.Encoding), ',')
	}
	if a.Cut {
		dst = append(dst, `"cut":true,`...)
	}
	dst = append(dst, `"body":"`...)
	dst = base64.StdEncoding.AppendEncode(dst, a.Body)
	return append(dst, `"}`...)
}
