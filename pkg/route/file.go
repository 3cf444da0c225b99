package route

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/holdfast-io/holdfast/pkg/service"
)

// Limits of a routes file. They are far above what people write, and keep a file
// that is something else altogether, or made of aliases of aliases, from taking
// the memory of the process.
const (
	maxFile     = 1 << 20
	maxRoutes   = 1000
	maxList     = 100 // elements of a list, or set_headers
	maxPath     = 1024
	maxProblems = 100
)

// loadFile reads the routes of a file.
func loadFile(path string, maxBody int64) (*Table, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, &FileError{Path: path, Problems: []Problem{{What: err.Error()}}}
	}
	return parse(path, data, maxBody)
}

// parse reads the routes of data, which path holds.
func parse(path string, data []byte, maxBody int64) (*Table, error) {
	r := &reader{path: path, maxBody: maxBody}
	routes := r.document(data)
	if len(r.problems) > 0 {
		slices.SortStableFunc(r.problems, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
		return nil, &FileError{Path: path, Problems: r.problems}
	}
	return newTable(routes), nil
}

func readFile(path string) ([]byte, error) {
	// The path stands in the message already.
	bare := func(err error) error {
		if p, ok := errors.AsType[*os.PathError](err); ok {
			err = p.Err
		}
		return fmt.Errorf("cannot be read: %w", err)
	}
	// Before it is opened: to open a pipe may take for ever.
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, bare(err)
	case !info.Mode().IsRegular():
		return nil, errors.New("is not a file; name one that holds routes")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, bare(err)
	}
	defer func() { _ = f.Close() }() // nothing was written
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, bare(err)
	case len(data) > maxFile:
		return nil, errors.New("is larger than 1MiB, the most that a routes file may be")
	}
	return data, nil
}

// reader turns YAML into routes and keeps what is wrong.
type reader struct {
	path     string
	maxBody  int64
	problems []Problem
	found    int // of problems, those that are kept and others
}

// wrong keeps a problem. An anchor that is used twice has its problems once.
func (r *reader) wrong(line int, format string, args ...any) {
	r.found++
	p := Problem{Line: line, What: fmt.Sprintf(format, args...)}
	if !r.full() && !slices.Contains(r.problems, p) {
		r.problems = append(r.problems, p)
	}
}

// full reports whether there are enough problems: nothing more is looked for.
func (r *reader) full() bool { return len(r.problems) >= maxProblems }

func (r *reader) document(data []byte) []*Route {
	if line, what := notText(data); what != "" {
		r.wrong(line, "%s; write UTF-8 text", what)
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		r.wrong(0, "is empty; write routes: and a list of them")
		return nil
	case err != nil:
		r.syntax(data, err)
		return nil
	}
	switch err := dec.Decode(&second); {
	case err == nil:
		r.wrong(second.Line, "a second document begins here; write one")
	case !errors.Is(err, io.EOF):
		r.syntax(data, err)
	}
	top := r.fields(doc.Content[0], "the file", "routes")
	list, ok := top["routes"]
	if !ok {
		if top != nil {
			r.wrong(doc.Content[0].Line, "routes is missing; write routes: and a list of them")
		}
		return nil
	}
	return r.routes(list)
}

// notText finds what a YAML file must not hold, with its line.
func notText(data []byte) (line int, what string) {
	line = 1
	for i := 0; i < len(data); {
		c, size := utf8.DecodeRune(data[i:])
		switch {
		case c == utf8.RuneError && size == 1:
			return line, "a byte is not UTF-8"
		case c == '\n':
			line++
		case c < ' ' && c != '\t' && c != '\r', 0x7f <= c && c < 0xa0:
			return line, fmt.Sprintf("the control character %U is not allowed", c)
		}
		i += size
	}
	return 0, ""
}

// syntax says what the parser met, in which line.
func (r *reader) syntax(data []byte, err error) {
	what := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if m := regexp.MustCompile(`^line (\d+): `).FindStringSubmatch(what); m != nil {
		what = what[len(m[0]):]
		line, _ = strconv.Atoi(m[1]) // of digits; one that overflows is as good as none
		if strings.HasPrefix(what, "did not find expected") {
			line++ // the parser counts such lines from 0
		}
	}
	if m := regexp.MustCompile(`^unknown anchor '(.*)' referenced$`).FindStringSubmatch(what); m != nil {
		if at := bytes.Index(data, []byte("*"+m[1])); at >= 0 {
			line = 1 + bytes.Count(data[:at], []byte("\n"))
		}
	}
	r.wrong(line, "is not YAML: %s", what)
}

// target gives the node itself where n is an alias.
func target(n *yaml.Node) *yaml.Node {
	for n.Kind == yaml.AliasNode && n.Alias != nil {
		n = n.Alias
	}
	return n
}

// kind names what a node is, for people.
func kind(n *yaml.Node) string {
	switch n = target(n); {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.ShortTag() == "!!null":
		return "empty"
	}
	return "a single value"
}

// fields gives the values of a mapping by their keys, nil when n is none. With
// known, other keys are problems. What a merge key brings stands behind what the
// mapping says itself.
func (r *reader) fields(n *yaml.Node, what string, known ...string) map[string]*yaml.Node {
	if target(n).Kind != yaml.MappingNode {
		allowed := "a mapping"
		if len(known) > 0 {
			allowed += " with " + alternatives(known)
		}
		r.wrong(n.Line, "%s is %s; write %s", what, kind(n), allowed)
		return nil
	}
	fields := make(map[string]*yaml.Node)
	r.merge(target(n), what, known, fields, make(map[*yaml.Node]bool))
	return fields
}

// merge adds what fields does not have yet. Each mapping is gone through once.
func (r *reader) merge(n *yaml.Node, what string, known []string, fields map[string]*yaml.Node, done map[*yaml.Node]bool) {
	if done[n] {
		return
	}
	done[n] = true
	if n.Kind != yaml.MappingNode {
		r.wrong(n.Line, "<< takes a mapping or a list of them; this is %s", kind(n))
		return
	}
	lines := make(map[string]int)
	var merged []*yaml.Node
	for i := 0; i+1 < len(n.Content) && !r.full(); i += 2 {
		key, value := target(n.Content[i]), n.Content[i+1]
		name := key.Value
		switch first, twice := lines[name]; {
		case key.ShortTag() == "!!merge":
			if from := target(value); from.Kind == yaml.SequenceNode {
				merged = append(merged, from.Content...)
			} else {
				merged = append(merged, value)
			}
			continue
		case key.Kind != yaml.ScalarNode:
			r.wrong(n.Content[i].Line, "a key of %s is %s; write a word", what, kind(key))
			continue
		case twice:
			r.wrong(n.Content[i].Line, "%s is there twice in %s, first in line %d; keep one", quoted(name), what, first)
			continue
		}
		lines[name] = n.Content[i].Line
		if len(known) > 0 && !slices.Contains(known, name) {
			hint := "allowed is "
			if near := nearest(name, known); near != "" {
				hint = "did you mean " + near + "? Allowed is "
			}
			r.wrong(n.Content[i].Line, "%s is no key of %s; %s%s", quoted(name), what, hint, alternatives(known))
			continue
		}
		if _, have := fields[name]; !have {
			fields[name] = value
		}
	}
	for _, m := range merged {
		r.merge(target(m), what, known, fields, done)
	}
}

// text gives a single value as it is written. ok is false when there is none.
func (r *reader) text(n *yaml.Node, what string) (text string, ok bool) {
	s := target(n)
	switch {
	case s.Kind != yaml.ScalarNode || s.ShortTag() == "!!null":
		r.wrong(n.Line, "%s is %s; write a single value", what, kind(n))
	case s.Value == "":
		r.wrong(n.Line, "%s is empty; write a value", what)
	case !slices.Contains([]string{"!!str", "!!int", "!!float", "!!bool", "!!timestamp", "!!merge"}, s.ShortTag()):
		r.wrong(n.Line, "%s has the tag %s; write a plain value", what, quoted(s.Tag))
	default:
		return s.Value, true
	}
	return "", false
}

// list calls each for every single value of a list, which must have one. each
// gives the form in which values are compared: none may come twice. An empty one
// says that the value is wrong and was reported.
func (r *reader) list(n *yaml.Node, what string, each func(item *yaml.Node, text string) string) {
	l := target(n)
	switch {
	case l.Kind != yaml.SequenceNode:
		r.wrong(n.Line, "%s is %s; write a list, in brackets or with a dash before each", what, kind(n))
		return
	case len(l.Content) == 0:
		r.wrong(n.Line, "%s is an empty list; write what it should hold, or leave it out", what)
		return
	case len(l.Content) > maxList:
		r.wrong(n.Line, "%s has %d elements; the most are %d", what, len(l.Content), maxList)
		return
	}
	seen := make(map[string]bool)
	for _, item := range l.Content {
		text, ok := r.text(item, "an element of "+what)
		if !ok {
			continue
		}
		canonical := each(item, text)
		if canonical != "" && seen[canonical] {
			r.wrong(item.Line, "%s is twice in %s; keep one", quoted(text), what)
		}
		seen[canonical] = true
	}
}

// quoted quotes a value and keeps its line readable.
func quoted(text string) string {
	const most = 60
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most]) + "…"
	}
	return strconv.Quote(text)
}

// alternatives writes "a", or "a, b or c".
func alternatives(words []string) string {
	last := len(words) - 1
	if last == 0 {
		return words[0]
	}
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// nearest gives the known word with the fewest edits, or none when even that
// would change more than a third of the word.
func nearest(word string, known []string) string {
	best, fewest := "", len(word)/3+1
	for _, k := range known {
		if len(word) > 2*len(k) {
			continue
		}
		if d := service.Edits(word, k); d < fewest {
			best, fewest = k, d
		}
	}
	return best
}
