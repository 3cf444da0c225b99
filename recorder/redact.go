package recorder

import (
	"bytes"
	"strings"
)

// redacted stands for a value that is not shown.
const redacted = "[redacted]"

// isSecret says whether a header of that name holds credentials, in any
// spelling: letter case, and "_" for "-".
func isSecret(name []byte) bool {
	switch strings.ReplaceAll(strings.ToLower(string(bytes.TrimSpace(name))), "_", "-") {
	case "authorization", "proxy-authorization", "cookie", "cookie2":
		return true
	}
	return false
}

// redact gives a copy of the lines with the values of credentials replaced,
// folded lines included. Line ends stay as they are.
func redact(lines []byte) []byte {
	out := make([]byte, 0, len(lines))
	secret := false
	for line := range bytes.Lines(lines) {
		if folded := line[0] == ' ' || line[0] == '\t'; folded {
			if secret {
				continue
			}
			out = append(out, line...)
			continue
		}
		name, _, ok := bytes.Cut(line, []byte(":"))
		if secret = ok && isSecret(name); !secret {
			out = append(out, line...)
			continue
		}
		out = append(out, name...)
		out = append(out, ": "+redacted...)
		out = append(out, line[len(bytes.TrimRight(line, "\r\n")):]...)
	}
	return out
}

// headersOf takes a head apart: all lines but the first and the empty one.
func headersOf(head []byte) []header {
	_, rest, _ := bytes.Cut(head, []byte("\r\n"))
	headers := []header{}
	for line := range bytes.SplitSeq(rest, []byte("\r\n")) {
		name, value, ok := bytes.Cut(line, []byte(":"))
		if ok {
			headers = append(headers, header{Name: text(string(name)), Value: text(string(bytes.TrimSpace(value)))})
		}
	}
	return headers
}
