package wire

import (
	"errors"
	"strconv"
	"strings"
)

// Request is the head of a request. Its strings share one copy of the head.
type Request struct {
	Method       string
	Target       string // in origin form, or "*"; the bytes that were sent
	Major, Minor int    // 1 and 0 or 1; 2 and 0 where HTTP/2 was spoken
	Host         string // of the Host field; may be empty
	Fields       Fields // all of them, framing included
	Length       int64  // of the body, or Chunked
	Close        bool   // the client asks for the connection to be closed
	Expect       bool   // the client waits for "100 Continue"
	// Upgrade is the value of the Upgrade field, where Connection names it.
	Upgrade string
	// Nominated are the further names that Connection makes hop-by-hop.
	Nominated []string
}

// ReadRequest reads a head of at most limit bytes with at most fields fields into
// req, whose slices are used again. The error is a *SyntaxError where the head is
// not taken, else that of [Reader.Head]; req then holds what was read before it.
func ReadRequest(r *Reader, req *Request, limit, fields int) error {
	req.Reset()
	head, err := r.Head(limit)
	if err == nil && len(head) == 2 && head[0] == '\r' {
		// One empty line before a request is ignored (RFC 9112 section 2.2).
		head, err = r.Head(limit)
	}
	if err != nil {
		if errors.Is(err, ErrHeadTooLarge) {
			err = &SyntaxError{Status: 431, Reason: "the head has more than the " + strconv.Itoa(limit) + " bytes that are allowed"}
		}
		return err
	}
	return req.parse(string(head), fields)
}

// Reset empties req but for the room of its slices.
func (req *Request) Reset() {
	*req = Request{Fields: req.Fields[:0], Nominated: req.Nominated[:0]}
}

// parse reads a whole head into an empty request.
func (req *Request) parse(head string, fields int) error {
	line, rest, err := cutLine(head, false)
	if err != nil {
		return err
	}
	if err := req.parseLine(line); err != nil {
		return err
	}
	if req.Fields, err = parseFields(req.Fields, rest, fields, false); err != nil {
		return err
	}
	if err := req.interpret(); err != nil {
		return err
	}
	return req.resolveTarget()
}

// parseLine reads "METHOD SP target SP HTTP/1.1".
func (req *Request) parseLine(line string) error {
	method, rest, ok := strings.Cut(line, " ")
	if !ok || !IsToken(method) {
		return bad("the request line does not begin with a method and a space")
	}
	i := strings.LastIndexByte(rest, ' ')
	if i <= 0 {
		return bad("the request line has no target or no version")
	}
	target, version := rest[:i], rest[i+1:]
	if !only(target, targetByte) {
		return bad("the target holds a space, a control character or a fragment")
	}
	req.Method, req.Target, req.Major = method, target, 1
	switch {
	case version == "HTTP/1.1":
		req.Minor = 1
	case version == "HTTP/1.0":
	case len(version) == 8 && strings.HasPrefix(version, "HTTP/") && digit(version[5]) && version[6] == '.' && digit(version[7]):
		if version[5] != '1' {
			return &SyntaxError{Status: 505, Reason: "this version of HTTP is not spoken here; HTTP/1.1 is"}
		}
		req.Minor = 1
	default:
		return bad("the request line does not end in a version of HTTP")
	}
	return nil
}

// maxHost is more than a host and a port have (RFC 1035 section 2.3.4).
const maxHost = 256 + len(":65535")

// ValidHost reports whether s is a host with an optional port (RFC 3986 section
// 3.2.2): a name, an IPv4 address, or an IPv6 one in brackets.
func ValidHost(s string) bool {
	if len(s) > maxHost {
		return false
	}
	host, port := s, ""
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return false
		}
		if host, port = s[1:end], s[end+1:]; !only(host, hostByte) || !strings.Contains(host, ":") || strings.Contains(host, "[") {
			return false
		}
	} else {
		if i := strings.IndexByte(s, ':'); i >= 0 {
			host, port = s[:i], s[i:]
		}
		for i := range len(host) {
			if c := host[i]; c == '[' || c == ']' || c == '%' && (i+2 >= len(host) || !hex(host[i+1]) || !hex(host[i+2])) {
				return false
			}
		}
		if host == "" || !only(host, hostByte) {
			return false
		}
	}
	if port == "" {
		return true
	}
	if port[0] != ':' || len(port) > len(":65535") {
		return false
	}
	for i := 1; i < len(port); i++ {
		if !digit(port[i]) {
			return false
		}
	}
	return true
}

func hex(c byte) bool { return digit(c) || 'a' <= c|0x20 && c|0x20 <= 'f' }

func digit(c byte) bool { return '0' <= c && c <= '9' }

// interpret reads the fields that tell of framing and of the connection.
func (req *Request) interpret() error {
	var length, coding *Field
	hosts := 0
	upgrade := ""
	upgradeNamed, keep := false, false
	for i := range req.Fields {
		f := &req.Fields[i]
		switch f.Kind {
		case Host:
			if hosts++; hosts > 1 {
				return bad("there is more than one Host field")
			}
			if f.Value != "" && !ValidHost(f.Value) {
				return bad("the Host field is not a host with an optional port")
			}
			req.Host = f.Value
		case ContentLength:
			if length != nil {
				return bad("there is more than one Content-Length field")
			}
			length = f
		case TransferEncoding:
			if coding != nil {
				return bad("there is more than one Transfer-Encoding field")
			}
			coding = f
		case Connection:
			tokens(f.Value, func(t string) {
				switch {
				case Equal(t, "close"):
					req.Close = true
				case Equal(t, "keep-alive"):
					keep = true
				case Equal(t, "upgrade"):
					upgradeNamed = true
				default:
					req.Nominated = append(req.Nominated, t)
				}
			})
		case Upgrade:
			if upgrade != "" {
				upgrade += ", "
			}
			upgrade += f.Value
		case Expect:
			if !Equal(f.Value, "100-continue") {
				return &SyntaxError{Status: 417, Reason: "no expectation but 100-continue can be met"}
			}
			req.Expect = req.Minor > 0 // HTTP/1.0 knows none (RFC 9110 section 10.1.1)
		}
	}
	if hosts == 0 && req.Minor > 0 {
		return bad("there is no Host field")
	}
	if req.Minor == 0 && !keep {
		req.Close = true
	}
	if upgradeNamed && req.Minor > 0 {
		req.Upgrade = upgrade
	}
	switch {
	case coding != nil && req.Minor == 0:
		return bad("HTTP/1.0 has no Transfer-Encoding")
	case coding != nil && length != nil:
		return bad("there are both Content-Length and Transfer-Encoding")
	case coding != nil && Equal(coding.Value, "chunked"):
		req.Length = Chunked
	case coding != nil && HasToken(coding.Value, "chunked"):
		return bad("the Transfer-Encoding is not exactly chunked")
	case coding != nil:
		return &SyntaxError{Status: 501, Reason: "this Transfer-Encoding is not known here; chunked is"}
	case length != nil:
		n, ok := parseLength(length.Value)
		if !ok {
			return bad("the Content-Length is not one number")
		}
		req.Length = n
	}
	return nil
}

// parseLength reads digits and nothing else.
func parseLength(s string) (int64, bool) {
	if s == "" || len(s) > 18 && len(strings.TrimLeft(s, "0")) > 18 {
		return 0, false
	}
	n := int64(0)
	for i := range len(s) {
		if !digit(s[i]) {
			return 0, false
		}
		n = n*10 + int64(s[i]-'0')
	}
	return n, true
}

// resolveTarget takes scheme and authority off a target in absolute form, which
// must name the same host as the Host field (RFC 9112 section 3.2).
func (req *Request) resolveTarget() error {
	target := req.Target
	switch {
	case req.Method == "CONNECT":
		return bad("this is no tunnel: CONNECT is not taken")
	case target[0] == '/':
		return nil
	case target == "*":
		if req.Method != "OPTIONS" {
			return bad("the target * belongs to OPTIONS")
		}
		return nil
	}
	scheme, rest, ok := strings.Cut(target, "://")
	if !ok || !Equal(scheme, "http") && !Equal(scheme, "https") {
		return bad("the target is neither a path nor an http URL")
	}
	authority := rest
	path := "/"
	if i := strings.IndexAny(rest, "/?"); i >= 0 {
		authority, path = rest[:i], rest[i:]
		if path[0] == '?' {
			path = "/" + path
		}
	} else if req.Method == "OPTIONS" {
		path = "*" // RFC 9112 section 3.2.4
	}
	if !ValidHost(authority) {
		return bad("the target names no host")
	}
	if req.Minor == 0 && req.Host == "" {
		req.Host = authority
	}
	if !Equal(authority, req.Host) {
		return bad("the target names another host than the Host field")
	}
	req.Target = path
	return nil
}

// CheckTarget checks a target that came by another way than a request line, over
// HTTP/2 for instance: it must be fit for one.
func CheckTarget(method, target string) error {
	switch {
	case target == "" || !only(target, targetByte):
		return bad("the target holds a space, a control character or a fragment")
	case target[0] != '/' && (target != "*" || method != "OPTIONS"):
		return bad("the target is no path")
	}
	return nil
}
