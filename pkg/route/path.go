package route

import (
	"bytes"
	"strings"
)

// normalize gives the path as routes compare it; see the package's comment. What
// needs no change is returned as it is, without an allocation. The empty path is
// "/" (RFC 3986 section 6.2.3); a percent sign that begins no encoding is taken
// for an encoded one. It is idempotent.
func normalize(path string) string {
	if path == "" {
		return "/"
	}
	for i := 0; i < len(path); i++ {
		switch c := path[i]; {
		case c == '%':
			if !normalTriplet(path[i:]) {
				return removeDots(encode(path))
			}
		case !inPath(c), c == '.' && i > 0 && path[i-1] == '/' && isDots(path[i:]):
			return removeDots(encode(path))
		}
	}
	return path
}

// normalTriplet reports whether s begins with a percent-encoding that stays.
func normalTriplet(s string) bool {
	return len(s) >= 3 && isHex(s[1]) && isHex(s[2]) && s[1] < 'a' && s[2] < 'a' &&
		!unreserved(fromHex(s[1])<<4|fromHex(s[2]))
}

// isDots reports whether the segment that s begins with is "." or "..", where s
// begins with a dot.
func isDots(s string) bool {
	s = strings.TrimPrefix(s[1:], ".")
	return s == "" || s[0] == '/'
}

// inPath reports whether c may stand in a path as itself: a pchar of RFC 3986,
// or a slash.
func inPath(c byte) bool {
	return unreserved(c) || strings.IndexByte("/!$&'()*+,;=:@", c) >= 0
}

func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
		c == '-' || c == '.' || c == '_' || c == '~'
}

// encode percent-encodes what may not stand in a path, and nothing else.
func encode(path string) string {
	const digits = "0123456789ABCDEF"
	b := make([]byte, 0, len(path)+16)
	for i := 0; i < len(path); i++ {
		c := path[i]
		plain := c != '%' && inPath(c)
		if c == '%' && i+2 < len(path) && isHex(path[i+1]) && isHex(path[i+2]) {
			c = fromHex(path[i+1])<<4 | fromHex(path[i+2])
			plain = unreserved(c)
			i += 2
		}
		if plain {
			b = append(b, c)
		} else {
			b = append(b, '%', digits[c>>4], digits[c&15])
		}
	}
	return string(b)
}

// removeDots removes the segments "." and ".." as RFC 3986 section 5.2.4 does.
func removeDots(path string) string {
	if !strings.Contains(path, "/.") {
		return path
	}
	out := make([]byte, 0, len(path))
	for rest := path; rest != ""; {
		end := strings.IndexByte(rest[1:], '/') + 1
		if end == 0 {
			end = len(rest)
		}
		segment := rest[:end]
		rest = rest[end:]
		switch segment {
		case "/.", "/..":
			if segment == "/.." {
				out = out[:max(bytes.LastIndexByte(out, '/'), 0)]
			}
			if rest == "" {
				out = append(out, '/')
			}
		default:
			out = append(out, segment...)
		}
	}
	return string(out)
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func fromHex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c&^0x20 - 'A' + 10
}
