package exchange

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"unicode/utf8"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

type vegeta struct{ w *bufio.Writer }

// NewVegeta writes a target a line, as vegeta attack -format=json reads them. A
// request that vegeta would send in another form is left out: a target that a Go
// URL does not keep as it is, or bytes in a header that are not UTF-8. A trailer
// section is left out and marked. Vegeta itself adds X-Vegeta-Seq, and
// Accept-Encoding where there is none, orders headers by name, gives every body a
// Content-Length, and decides by the method whether it tells of no body.
func NewVegeta(w io.Writer) Writer { return vegeta{bufio.NewWriterSize(w, 64<<10)} }

func (v vegeta) Write(_ context.Context, item *Item) (Result, error) {
	switch {
	case item.Missing != "":
		return Result{LeftOut, item.Missing}, nil
	case item.Base == "":
		return Result{LeftOut, noBase}, nil
	case !keeps(item.Base, item.target):
		return Result{LeftOut, "vegeta would change its target"}, nil
	}
	header := make(map[string][]string)
	for _, f := range append(item.all(), wire.Field{Name: "User-Agent"}) {
		name := f.Name
		switch {
		case f.Kind == wire.ContentLength, f.Kind == wire.TransferEncoding:
			continue // it makes its own
		case f.Kind == wire.Host, wire.Equal(name, "User-Agent"):
			// Known by this spelling alone. An empty User-Agent keeps Go's away, and
			// of several Go sends the first.
			if name = http.CanonicalHeaderKey(name); name == "User-Agent" && len(header[name]) > 0 {
				if f.Value != "" {
					return Result{LeftOut, "vegeta would send one of its User-Agent fields only"}, nil
				}
				continue
			}
		}
		if !utf8.ValidString(f.Value) {
			return Result{LeftOut, "its field " + f.Name + " is not UTF-8"}, nil
		}
		header[name] = append(header[name], f.Value)
	}
	v.put(`{"method":`, item.method, `,"url":`, item.Base+item.target, `,"header":`, header)
	if item.Body.Size() > 0 {
		_, _ = v.w.WriteString(`,"body":"`) // an error comes back with the flush, here and below
		if err := base64To(v.w, item.Body.Reader()); err != nil {
			return Result{}, err
		}
		_ = v.w.WriteByte('"')
	}
	_, err := v.w.WriteString("}\n")
	if len(item.trailer) > 0 {
		return Result{Marked, "vegeta sends no trailers"}, err
	}
	return Result{}, err
}

func (v vegeta) Close() error { return v.w.Flush() }

// put writes text and, at every odd place, a value as JSON. What went wrong comes
// back with the flush.
func (v vegeta) put(parts ...any) {
	for i, p := range parts {
		if i%2 == 0 {
			_, _ = v.w.WriteString(p.(string))
		} else {
			_, _ = v.w.Write(encode(p))
		}
	}
}

// noBase is why a request is left out that nobody knows an API for.
const noBase = "its route has no API; give --upstream"

// keeps reports whether Go's clients, and others that parse URLs by the book,
// send this target as it is.
func keeps(base, target string) bool {
	for i := range len(target) {
		if target[i] >= 0x80 {
			return false
		}
	}
	u, err := url.Parse(base + target)
	return err == nil && u.RequestURI() == target
}

// base64To writes what r gives in base64.
func base64To(w io.Writer, r io.Reader) error {
	enc := base64.NewEncoder(base64.StdEncoding, w)
	if _, err := io.Copy(enc, r); err != nil {
		return err
	}
	return enc.Close()
}

// encode gives v as JSON. Every v here can be encoded.
func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // a fault of the program: v is made of strings and numbers
	}
	return data
}
