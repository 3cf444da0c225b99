package replayer

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"mime"
	"slices"
	"strconv"
	"strings"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// Difference is one place where two bodies differ. A value is JSON in a JSON
// body, else text with what is not printable percent-encoded; it is clipped, and
// empty where there is none at that place, or where values are not shown.
type Difference struct {
	Path   string `json:"path"` // a JSON path, or "byte 17"
	Stored string `json:"stored,omitempty"`
	Test   string `json:"test,omitempty"`
}

const (
	// maxDifferences bounds the places of one example, maxValueShown a value in it.
	maxDifferences = 5
	maxValueShown  = 120
	// maxDecoded bounds a body without its content coding: a few bytes of gzip
	// may stand for gigabytes.
	maxDecoded = 16 << 20
)

// differences compares two whole bodies: JSON by value without what is to be
// ignored, others byte by byte. It gives the first ones; none means equal.
func differences(stored, test *capture.Answer, ignore []JSONPath) []Difference {
	a, b := decoded(stored), decoded(test)
	if isJSON(stored.Type) && isJSON(test.Type) {
		va, errA := parseJSON(a)
		vb, errB := parseJSON(b)
		if errA == nil && errB == nil {
			d := differ{ignore: ignore}
			d.compare(nil, va, vb)
			return d.found
		}
	}
	if bytes.Equal(a, b) {
		return nil
	}
	at := 0
	for at < len(a) && at < len(b) && a[at] == b[at] {
		at++
	}
	return []Difference{{Path: "byte " + strconv.Itoa(at), Stored: clipped(printable(string(a[at:min(len(a), at+maxValueShown)]))),
		Test: clipped(printable(string(b[at:min(len(b), at+maxValueShown)])))}}
}

// decoded gives a body without gzip, where that is its coding. One that cannot be
// decoded stays as it is.
func decoded(a *capture.Answer) []byte {
	if !strings.EqualFold(strings.TrimSpace(a.Encoding), "gzip") {
		return a.Body
	}
	r, err := gzip.NewReader(bytes.NewReader(a.Body))
	if err != nil {
		return a.Body
	}
	plain, err := io.ReadAll(io.LimitReader(r, maxDecoded+1))
	if err != nil || len(plain) > maxDecoded {
		return a.Body
	}
	return plain
}

func isJSON(contentType string) bool {
	t, _, err := mime.ParseMediaType(contentType)
	return err == nil && (t == "application/json" || strings.HasSuffix(t, "+json"))
}

func parseJSON(body []byte) (v any, err error) {
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the document")
	}
	return v, nil
}

// differ collects where two values differ.
type differ struct {
	ignore []JSONPath
	found  []Difference
}

// nothing stands for a member or element that is not there.
type nothing struct{}

func (d *differ) compare(at JSONPath, a, b any) {
	if len(d.found) >= maxDifferences || slices.ContainsFunc(d.ignore, func(p JSONPath) bool { return p.names(at) }) {
		return
	}
	switch a := a.(type) {
	case map[string]any:
		if b, ok := b.(map[string]any); ok {
			names := slices.Collect(maps.Keys(a))
			names = append(names, slices.Collect(maps.Keys(b))...)
			slices.Sort(names)
			for _, name := range slices.Compact(names) {
				d.compare(at.with(step{name: name}), member(a, name), member(b, name))
			}
			return
		}
	case []any:
		if b, ok := b.([]any); ok {
			for i := range max(len(a), len(b)) {
				d.compare(at.with(step{kind: stepIndex, index: i}), element(a, i), element(b, i))
			}
			return
		}
	case json.Number:
		if b, ok := b.(json.Number); ok && sameNumber(a.String(), b.String()) {
			return
		}
	default:
		if a == b {
			return
		}
	}
	d.found = append(d.found, Difference{Path: at.String(), Stored: shown(a), Test: shown(b)})
}

// with gives the path of what is below. It shares nothing with other paths.
func (p JSONPath) with(s step) JSONPath { return append(slices.Clip(p), s) }

func member(m map[string]any, name string) any {
	if v, ok := m[name]; ok {
		return v
	}
	return nothing{}
}

func element(list []any, i int) any {
	if i < len(list) {
		return list[i]
	}
	return nothing{}
}

// sameNumber compares by value, 1.0 and 1 and 10e-1 alike. Numbers with absurd
// exponents are compared as they are written.
func sameNumber(a, b string) bool {
	if a == b {
		return true
	}
	for _, s := range []string{a, b} {
		_, exponent, _ := strings.Cut(strings.ToLower(s), "e")
		if n, err := strconv.Atoi(exponent); len(s) > 1000 || exponent != "" && (err != nil || n > 1000 || n < -1000) {
			return false
		}
	}
	x, okX := new(big.Rat).SetString(a)
	y, okY := new(big.Rat).SetString(b)
	return okX && okY && x.Cmp(y) == 0
}

func shown(v any) string {
	if _, none := v.(nothing); none {
		return ""
	}
	text, err := json.Marshal(v)
	if err != nil { // what was parsed can be written
		return fmt.Sprint(v)
	}
	return clipped(string(text))
}

func clipped(s string) string {
	if len(s) <= maxValueShown {
		return s
	}
	return strings.ToValidUTF8(s[:maxValueShown], "") + "…"
}
