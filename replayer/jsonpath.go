package replayer

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// JSONPath names parts of a JSON document, in a small part of RFC 9535: "$", then
// any number of ".name", "['name']" (or with double quotes, where a backslash
// stands before a quote or a backslash of the name), "[7]", "[*]" and ".*". A star
// is every member of an object and every element of an array.
type JSONPath []step

// step is one member or element.
type step struct {
	name  string // of a member
	index int    // of an element
	kind  stepKind
}

type stepKind int

const (
	stepName stepKind = iota
	stepIndex
	stepAny
)

var errPath = errors.New("begins with $ and goes on with .name, ['name'], [7], [*] or .*; write for instance $.items[*].id")

// ParseJSONPath reads a path.
func ParseJSONPath(text string) (JSONPath, error) {
	rest, ok := strings.CutPrefix(text, "$")
	if !ok || rest == "" {
		return nil, errPath // the whole document is no part of it
	}
	var p JSONPath
	for rest != "" {
		var s step
		var err error
		switch {
		case strings.HasPrefix(rest, ".*"):
			s.kind, rest = stepAny, rest[2:]
		case strings.HasPrefix(rest, "[*]"):
			s.kind, rest = stepAny, rest[3:]
		case strings.HasPrefix(rest, "['"), strings.HasPrefix(rest, `["`):
			s.name, rest, err = quotedName(rest[2:], rest[1])
		case rest[0] == '[':
			digits, after, found := strings.Cut(rest[1:], "]")
			s.kind, rest = stepIndex, after
			if s.index, err = strconv.Atoi(digits); !found || s.index < 0 {
				err = errPath
			}
		case rest[0] == '.':
			end := strings.IndexAny(rest[1:], ".[") + 1
			if end == 0 {
				end = len(rest)
			}
			if s.name, rest = rest[1:end], rest[end:]; s.name == "" {
				err = errPath
			}
		default:
			err = errPath
		}
		if err != nil {
			return nil, errPath
		}
		p = append(p, s)
	}
	return p, nil
}

// quotedName reads a name up to its quote and the bracket after it.
func quotedName(text string, quote byte) (name, rest string, err error) {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] == '\\' && i+1 < len(text):
			i++
			b.WriteByte(text[i])
		case text[i] == quote:
			if rest, ok := strings.CutPrefix(text[i+1:], "]"); ok {
				return b.String(), rest, nil
			}
			return "", "", errPath
		default:
			b.WriteByte(text[i])
		}
	}
	return "", "", errPath
}

// String gives the path as [ParseJSONPath] reads it.
func (p JSONPath) String() string {
	var b strings.Builder
	b.WriteByte('$')
	for _, s := range p {
		switch {
		case s.kind == stepAny:
			b.WriteString("[*]")
		case s.kind == stepIndex:
			fmt.Fprintf(&b, "[%d]", s.index)
		case s.name == "" || s.name == "*" || strings.ContainsAny(s.name, ".[]'\"\\ \t\r\n"):
			b.WriteString("['" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s.name) + "']")
		default:
			b.WriteString("." + s.name)
		}
	}
	return b.String()
}

// names reports whether the path names the place at, which has no stars.
func (p JSONPath) names(at JSONPath) bool {
	if len(p) != len(at) {
		return false
	}
	for i, s := range p {
		if s.kind != stepAny && s != at[i] {
			return false
		}
	}
	return true
}
