package wire

import (
	"strings"
)

// Response is the head of an answer. Its strings share one copy of the head.
type Response struct {
	Status       int
	Reason       string
	Major, Minor int
	Fields       Fields // all of them, framing included
	Length       int64  // of the body that follows, Chunked, or UntilClose
	Announced    int64  // what Content-Length says, also where no body follows; -1 without it
	Close        bool   // the connection cannot be used again
	// Nominated are the names that Connection makes hop-by-hop.
	Nominated []string
}

// ReadResponse reads a head of at most limit bytes with at most fields fields of
// an answer to a request with this method into resp, whose slices are used again.
// The error is a *SyntaxError where it is no answer, else that of [Reader.Head].
func ReadResponse(r *Reader, resp *Response, method string, limit, fields int) error {
	head, err := r.Head(limit)
	if err != nil {
		return err
	}
	*resp = Response{Fields: resp.Fields[:0], Nominated: resp.Nominated[:0]}
	line, rest, err := cutLine(string(head), true)
	if err != nil {
		return err
	}
	if err := resp.parseLine(line); err != nil {
		return err
	}
	if resp.Fields, err = parseFields(resp.Fields, rest, fields, true); err != nil {
		return err
	}
	return resp.interpret(method)
}

// parseLine reads "HTTP/1.1 SP status [SP reason]".
func (resp *Response) parseLine(line string) error {
	version, rest, _ := strings.Cut(line, " ")
	if len(version) != 8 || !strings.HasPrefix(version, "HTTP/1.") || !digit(version[7]) {
		return bad("the answer does not begin with HTTP/1.1")
	}
	status, reason, _ := strings.Cut(strings.TrimLeft(rest, " "), " ")
	if len(status) != 3 || !digit(status[0]) || !digit(status[1]) || !digit(status[2]) || status[0] == '0' {
		return bad("the answer has no status of three digits")
	}
	if !only(reason, valueByte) {
		return bad("the reason phrase holds a control character")
	}
	resp.Status = int(status[0]-'0')*100 + int(status[1]-'0')*10 + int(status[2]-'0')
	resp.Reason, resp.Major = reason, 1
	if version[7] != '0' {
		resp.Minor = 1
	}
	return nil
}

// interpret reads framing (RFC 9112 section 6.3) and what is said of the
// connection.
func (resp *Response) interpret(method string) error {
	length := int64(-1)
	coded, keep := false, false
	for i := range resp.Fields {
		f := &resp.Fields[i]
		switch f.Kind {
		case ContentLength:
			// Several that are equal are one (RFC 9110 section 8.6).
			for v := range strings.SplitSeq(f.Value, ",") {
				n, ok := parseLength(trim(v))
				if !ok || length >= 0 && n != length {
					return bad("the answer's Content-Length is not one number")
				}
				length = n
			}
		case TransferEncoding:
			if coded || !Equal(f.Value, "chunked") {
				return bad("the answer's Transfer-Encoding is not exactly chunked")
			}
			coded = true
		case Connection:
			tokens(f.Value, func(t string) {
				switch {
				case Equal(t, "close"):
					resp.Close = true
				case Equal(t, "keep-alive"):
					keep = true
				default:
					resp.Nominated = append(resp.Nominated, t)
				}
			})
		}
	}
	if resp.Minor == 0 && !keep {
		resp.Close = true
	}
	resp.Announced = length
	switch {
	case resp.Status < 200, resp.Status == 204, resp.Status == 304, method == "HEAD":
		resp.Length = 0
	case coded && resp.Minor == 0:
		return bad("the answer of HTTP/1.0 has a Transfer-Encoding")
	case coded:
		resp.Length = Chunked
		// Who sends both lengths may mean either: nothing after it is trusted.
		resp.Close = resp.Close || length >= 0
	case length >= 0:
		resp.Length = length
	default:
		resp.Length, resp.Close = UntilClose, true
	}
	return nil
}
