package wire

import (
	"strings"
)

// Field is one field line of a head or of a trailer section.
type Field struct {
	Name  string // as it was spelled
	Value string // without the white space around it
	Kind  Kind   // what the name means, as KindOf gives it
}

// Fields are field lines in their order.
type Fields []Field

// Get gives the first value of the field, empty without one. Letter case of the
// name does not matter.
func (fs Fields) Get(name string) string {
	for i := range fs {
		if Equal(fs[i].Name, name) {
			return fs[i].Value
		}
	}
	return ""
}

// Has reports whether there is such a field.
func (fs Fields) Has(name string) bool {
	for i := range fs {
		if Equal(fs[i].Name, name) {
			return true
		}
	}
	return false
}

// Values gives the values of the field in order, nil without one.
func (fs Fields) Values(name string) []string {
	var values []string
	for i := range fs {
		if Equal(fs[i].Name, name) {
			values = append(values, fs[i].Value)
		}
	}
	return values
}

// Add appends a field.
func (fs Fields) Add(name, value string) Fields {
	return append(fs, Field{Name: name, Value: value, Kind: KindOf(name)})
}

// AppendField appends a field line.
func AppendField(dst []byte, name, value string) []byte {
	dst = append(dst, name...)
	dst = append(dst, ": "...)
	dst = append(dst, value...)
	return append(dst, "\r\n"...)
}

// Kind is what a field name means to whom passes messages on.
type Kind uint8

// The kinds. Those from Connection to ProxyAuth are hop-by-hop.
const (
	Other Kind = iota
	Host
	ContentLength
	TransferEncoding
	Connection
	KeepAlive // and Proxy-Connection
	TE
	Trailer
	Upgrade
	ProxyAuth // Proxy-Authenticate, Proxy-Authorization, Proxy-Authentication-Info
	Expect
	Via
	Date
	ContentType
	ForwardedFor   // X-Forwarded-For
	ForwardedHost  // X-Forwarded-Host
	ForwardedProto // X-Forwarded-Proto
	Forwarded      // Forwarded, X-Forwarded-Port, X-Real-Ip: other words of proxies about the client
)

// HopByHop reports whether fields of this kind end at the next hop (RFC 9110
// section 7.6.1).
func (k Kind) HopByHop() bool { return k >= Connection && k <= ProxyAuth || k == TransferEncoding }

// longestKnown is the length of the longest name that has a kind.
const longestKnown = len("proxy-authentication-info")

// KindOf gives the kind of a field name in any letter case.
func KindOf(name string) Kind {
	if len(name) > longestKnown {
		return Other
	}
	var lower [longestKnown]byte
	for i := range len(name) {
		c := name[i]
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		lower[i] = c
	}
	switch string(lower[:len(name)]) {
	case "host":
		return Host
	case "content-length":
		return ContentLength
	case "transfer-encoding":
		return TransferEncoding
	case "connection":
		return Connection
	case "keep-alive", "proxy-connection":
		return KeepAlive
	case "te":
		return TE
	case "trailer":
		return Trailer
	case "upgrade":
		return Upgrade
	case "proxy-authenticate", "proxy-authorization", "proxy-authentication-info":
		return ProxyAuth
	case "expect":
		return Expect
	case "via":
		return Via
	case "date":
		return Date
	case "content-type":
		return ContentType
	case "x-forwarded-for":
		return ForwardedFor
	case "x-forwarded-host":
		return ForwardedHost
	case "x-forwarded-proto":
		return ForwardedProto
	case "forwarded", "x-forwarded-port", "x-real-ip":
		return Forwarded
	}
	return Other
}

// Meaning is the kind that a CGI-like server gives the name, to which "_" is "-"
// (RFC 3875 section 4.1.18).
func (f *Field) Meaning() Kind {
	if f.Kind != Other || strings.IndexByte(f.Name, '_') < 0 {
		return f.Kind
	}
	return KindOf(strings.ReplaceAll(f.Name, "_", "-"))
}

// Equal reports whether two names or tokens are the same but for the case of
// their ASCII letters. Other letters fold into ASCII ones, a Kelvin sign into a k;
// in UTF-8 they are longer.
func Equal(a, b string) bool { return len(a) == len(b) && strings.EqualFold(a, b) }

// tokens calls each for the elements of a comma-separated list.
func tokens(list string, each func(string)) {
	for token := range strings.SplitSeq(list, ",") {
		if token = strings.Trim(token, " \t"); token != "" {
			each(token)
		}
	}
}

// HasToken reports whether a comma-separated list holds the token, in any letter
// case.
func HasToken(list, token string) bool {
	found := false
	tokens(list, func(t string) { found = found || Equal(t, token) })
	return found
}

// Classes of bytes.
const (
	tokenByte  = 1 << iota // of a token (RFC 9110 section 5.6.2)
	valueByte              // of a field value (RFC 9110 section 5.5), white space included
	targetByte             // of a request's target, as it is passed on
	hostByte               // of a host and port (RFC 3986 section 3.2.2)
)

// classes has the classes of each byte.
var classes = func() (t [256]uint8) {
	for c := range 256 {
		if '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' {
			t[c] |= tokenByte | hostByte
		}
		if c >= 0x20 && c != 0x7f || c == '\t' {
			t[c] |= valueByte
		}
		if c > 0x20 && c != 0x7f && c != '#' {
			t[c] |= targetByte
		}
	}
	for _, c := range []byte("!#$%&'*+-.^_`|~") {
		t[c] |= tokenByte
	}
	for _, c := range []byte("-._~!$&'()*+;=:[]%") {
		t[c] |= hostByte
	}
	return t
}()

// only reports whether every byte of s is of the class.
func only(s string, class uint8) bool {
	for i := range len(s) {
		if classes[s[i]]&class == 0 {
			return false
		}
	}
	return true
}

// IsToken reports whether s is a token (RFC 9110 section 5.6.2), as methods and
// field names are.
func IsToken(s string) bool { return s != "" && only(s, tokenByte) }

// IsValue reports whether s can stand as a field value on one line.
func IsValue(s string) bool { return only(s, valueByte) }

// parseFields reads the field lines in s, which ends with an empty line, and
// appends at most most of them to dst.
func parseFields(dst Fields, s string, most int, lenient bool) (Fields, error) {
	for {
		line, rest, err := cutLine(s, lenient)
		if err != nil {
			return dst, err
		}
		if line == "" {
			return dst, nil
		}
		s = rest
		if line[0] == ' ' || line[0] == '\t' {
			if !lenient || len(dst) == 0 {
				return dst, bad("a field line begins with white space: folded lines are not allowed")
			}
			folded := strings.Trim(line, " \t")
			if !only(folded, valueByte) {
				return dst, bad("a field value holds a control character")
			}
			dst[len(dst)-1].Value = trim(dst[len(dst)-1].Value + " " + folded)
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return dst, bad("a field line has no colon")
		}
		if lenient {
			name = strings.TrimRight(name, " \t")
		}
		if !IsToken(name) {
			if strings.TrimRight(name, " \t") != name {
				return dst, bad("a field name is followed by white space")
			}
			return dst, bad("a field name is empty or holds characters that are not allowed")
		}
		value = trim(value)
		if !only(value, valueByte) {
			return dst, bad("a field value holds a control character")
		}
		if len(dst) == most {
			return dst, &SyntaxError{Status: 431, Reason: "the head has more fields than are allowed"}
		}
		dst = append(dst, Field{Name: name, Value: value, Kind: KindOf(name)})
	}
}

// trim takes the white space around a value away.
func trim(s string) string {
	for s != "" && (s[0] == ' ' || s[0] == '\t') {
		s = s[1:]
	}
	for s != "" && (s[len(s)-1] == ' ' || s[len(s)-1] == '\t') {
		s = s[:len(s)-1]
	}
	return s
}

// cutLine cuts the first line off s.
func cutLine(s string, lenient bool) (line, rest string, err error) {
	i := strings.IndexByte(s, '\n')
	switch {
	case i < 0:
		return "", "", bad("a line has no end")
	case i > 0 && s[i-1] == '\r':
		return s[:i-1], s[i+1:], nil
	case lenient:
		return s[:i], s[i+1:], nil
	default:
		return "", "", bad("a line ends in LF without CR")
	}
}
