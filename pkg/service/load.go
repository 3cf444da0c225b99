package service

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kelseyhightower/envconfig"
)

// prefix begins the name of every setting.
const prefix = "HOLDFAST"

// nowhere is a prefix that no variable of an environment can have, because an
// equals sign cannot be part of a name: with it envconfig sees the default alone.
const nowhere = "="

// Setting describes one setting, for help.
type Setting struct {
	Name    string   // the full name
	Default string   // as help shows it, empty when there is none
	Meaning string   // what it does
	Allowed []string // the only values there are, nil when there are others
}

// validator is what a group of settings or a service's settings may have, to
// check what must go together.
type validator interface {
	Validate() []SettingError
}

// Load fills settings from the environment of the process. An empty variable
// counts as unset. With local, the defaults are those of a process that is all
// of Holdfast and listens on loopback.
//
// It then calls Validate() []SettingError on each embedded group and on the
// settings themselves, where they have it, and looks for HOLDFAST_ names that no
// binary knows. The error is a *SettingsError with everything that is wrong;
// settings then hold the defaults in place of what could not be read.
func Load(settings Settings, local bool) error {
	return load(settings, local, os.Getenv, os.Environ())
}

// Defaults fills settings with the defaults, whatever the environment says, and
// checks nothing that must be set. Tests start from it.
func Defaults(settings Settings, local bool) error {
	var problems []SettingError
	l := loader{local: local, getenv: func(string) string { return "" }}
	for _, f := range fields(settings) {
		problems = append(problems, l.fill(f)...)
	}
	return joined(problems)
}

func load(settings Settings, local bool, getenv func(string) string, environ []string) error {
	l := loader{local: local, getenv: getenv}
	var problems []SettingError
	known := knownNames()
	for _, f := range fields(settings) {
		if !known[f.name] {
			problems = append(problems, SettingError{f.name, "is not in the catalogue of settings; this is a fault of the program"})
			continue
		}
		problems = append(problems, l.fill(f)...)
	}
	unread := len(problems)
	for _, p := range validate(settings) {
		// A setting that could not be read holds its default: what that breaks
		// is no news.
		if !slices.ContainsFunc(problems[:unread], func(q SettingError) bool { return q.Name == p.Name }) {
			problems = append(problems, p)
		}
	}
	return joined(append(problems, unknown(environ, known)...))
}

func joined(problems []SettingError) error {
	if len(problems) == 0 {
		return nil
	}
	return &SettingsError{Problems: problems}
}

// field is one setting in the struct that holds it.
type field struct {
	name  string // the full name
	value reflect.Value
	typ   reflect.StructField
}

// fields walks the settings and the groups embedded in them.
func fields(settings Settings) []field {
	return walk(reflect.ValueOf(settings).Elem(), nil)
}

func walk(v reflect.Value, into []field) []field {
	for i := range v.NumField() {
		typ := v.Type().Field(i)
		switch {
		case typ.Anonymous && typ.Type.Kind() == reflect.Struct:
			into = walk(v.Field(i), into)
		case typ.IsExported():
			into = append(into, field{name: settingName(typ), value: v.Field(i), typ: typ})
		}
	}
	return into
}

// alone is a pointer to a struct that holds the one field and nothing else, so
// that envconfig, which stops at its first error, reads one setting at a time.
func alone(typ reflect.StructField, tag reflect.StructTag) reflect.Value {
	return reflect.New(reflect.StructOf([]reflect.StructField{{Name: typ.Name, Type: typ.Type, Tag: tag}}))
}

// settingName asks envconfig how it spells the field.
func settingName(typ reflect.StructField) string {
	var name strings.Builder
	if err := envconfig.Usagef(prefix, alone(typ, typ.Tag).Interface(), &name, "{{range .}}{{usage_key .}}{{end}}"); err != nil {
		panic(err) // the template is a constant and the writer cannot fail
	}
	return name.String()
}

// knownNames is every name that some binary knows.
func knownNames() map[string]bool {
	known := make(map[string]bool)
	for _, f := range fields(&catalogue{}) {
		known[f.name] = true
	}
	for _, flag := range replayFlags() {
		known[ReplayName(flag)] = true
	}
	return known
}

// loader reads single settings.
type loader struct {
	local  bool
	getenv func(string) string
}

// fill sets the field from the environment, or from its default when the
// variable is unset, empty, or wrong.
func (l loader) fill(f field) []SettingError {
	def, err := l.parse(f, "")
	if err != nil {
		return []SettingError{{f.name, fmt.Sprintf("the default %s; this is a fault of the program", err)}}
	}
	f.value.Set(def)
	text := l.getenv(f.name)
	if text == "" {
		return nil
	}
	v, err := l.parse(f, text)
	if err == nil {
		err = check(f, v)
	}
	if err != nil {
		reason := err.Error()
		if f.typ.Tag.Get("secret") != "true" {
			reason = fmt.Sprintf("%q %s", clipped(text), reason)
		}
		return []SettingError{{f.name, reason}}
	}
	f.value.Set(v)
	return nil
}

// parse reads a text, or the default when there is none, as envconfig does.
func (l loader) parse(f field, text string) (reflect.Value, error) {
	if text == "" {
		text = l.expand(l.defaultOf(f.typ))
	}
	return parse(f.typ, text)
}

// parse hands a text to envconfig as the default of a field that no environment
// sets: the text of a variable and that of a default are read alike.
func parse(typ reflect.StructField, text string) (reflect.Value, error) {
	tag := reflect.StructTag(fmt.Sprintf("split_words:\"true\" default:%q", text))
	one := alone(typ, tag)
	if err := envconfig.Process(nowhere, one.Interface()); err != nil {
		return reflect.Value{}, plain(typ.Type, err)
	}
	return one.Elem().Field(0), nil
}

// plain gives the reason without the text, which envconfig's own error repeats.
func plain(typ reflect.Type, err error) error {
	switch {
	case typ == reflect.TypeFor[time.Duration]():
		return errors.New("is not a duration; write for instance 30s, 5m or 24h")
	case typ.Kind() == reflect.Bool:
		return errors.New("is not allowed; allowed are true and false")
	case typ.Kind() == reflect.Int && typ.PkgPath() == "":
		return errors.New("is not a whole number")
	}
	if parse, ok := errors.AsType[*envconfig.ParseError](err); ok {
		return parse.Err
	}
	return err
}

// check holds a value that was read against the rules in the field's tags.
func check(f field, v reflect.Value) error {
	if allowed := list(f.typ.Tag, "allowed"); allowed != nil && !slices.Contains(allowed, v.String()) {
		return fmt.Errorf("is not allowed; allowed %s", enumerate(allowed))
	}
	if schemes := list(f.typ.Tag, "schemes"); schemes != nil {
		if !v.Interface().(ConnURL).hasScheme(schemes) {
			return fmt.Errorf("has a scheme that is not allowed; allowed %s", enumerate(schemes))
		}
	}
	for _, bound := range []string{"min", "max"} {
		text, ok := f.typ.Tag.Lookup(bound)
		if !ok {
			continue
		}
		limit, err := parse(f.typ, text)
		if err != nil {
			return fmt.Errorf("has a %s that %w; this is a fault of the program", bound, err)
		}
		if bound == "min" && v.Int() < limit.Int() {
			return fmt.Errorf("is too small; the least is %s", text)
		}
		if bound == "max" && v.Int() > limit.Int() {
			return fmt.Errorf("is too large; the most is %s", text)
		}
	}
	return nil
}

func list(tag reflect.StructTag, key string) []string {
	if text := tag.Get(key); text != "" {
		return strings.Split(text, ",")
	}
	return nil
}

// enumerate writes "is a" or "are a, b and c".
func enumerate(words []string) string {
	if len(words) == 1 {
		return "is " + words[0]
	}
	last := len(words) - 1
	return "are " + strings.Join(words[:last], ", ") + " and " + words[last]
}

// clipped keeps a line with a wrong value readable.
func clipped(text string) string {
	const most = 60
	if runes := []rune(text); len(runes) > most {
		return string(runes[:most]) + "…"
	}
	return text
}

func (l loader) defaultOf(typ reflect.StructField) string {
	if l.local {
		if def, ok := typ.Tag.Lookup("local"); ok {
			return def
		}
	}
	return typ.Tag.Get("default")
}

// expand fills in what a default takes from elsewhere.
func (l loader) expand(def string) string {
	if strings.Contains(def, "<data dir>") {
		dir := l.getenv(prefix + "_DATA_DIR")
		if dir == "" {
			typ, _ := reflect.TypeFor[Common]().FieldByName("DataDir")
			dir = l.defaultOf(typ)
		}
		def = strings.ReplaceAll(def, "<data dir>", dir)
	}
	if strings.Contains(def, "<host name>") {
		// Without a host name the setting stays empty, and its check asks for it.
		host, _ := os.Hostname()
		def = strings.ReplaceAll(def, "<host name>", idOf(host))
	}
	return def
}

// idOf makes an ingress's name of a host's: dots separate the tokens of a NATS
// subject, and a name there is one token.
func idOf(host string) string {
	id := strings.Map(func(r rune) rune {
		if r < 0x80 && (isAlnum(byte(r)) || r == '-' || r == '_') {
			return r
		}
		return '-'
	}, host)
	return id[:min(len(id), 64)]
}

// validate asks the groups, then the settings as a whole. A struct with one
// group that has Validate has it too: what is said twice counts once.
func validate(settings Settings) []SettingError {
	var problems []SettingError
	ask := func(v any) {
		if v, ok := v.(validator); ok {
			for _, p := range v.Validate() {
				if !slices.Contains(problems, p) {
					problems = append(problems, p)
				}
			}
		}
	}
	groups(reflect.ValueOf(settings).Elem(), ask)
	ask(settings)
	return problems
}

func groups(v reflect.Value, each func(any)) {
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.Anonymous && f.IsExported() && f.Type.Kind() == reflect.Struct {
			groups(v.Field(i), each)
			each(v.Field(i).Addr().Interface())
		}
	}
}

// unknown finds the names that no binary knows, in the order of the alphabet.
// Kubernetes injects …_PORT… and …_SERVICE_… for every Service whose name begins
// with holdfast: those are nobody's settings and nobody's mistake. An empty
// variable counts as unset here too.
func unknown(environ []string, known map[string]bool) []SettingError {
	links := regexp.MustCompile(`^HOLDFAST(_.*)?_(PORT(_.*)?|SERVICE_.*)$`)
	var problems []SettingError
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, prefix+"_") || value == "" || known[name] || links.MatchString(name) {
			continue
		}
		reason := "is not the name of a setting"
		if near := nearest(name, known); near != "" {
			reason += "; did you mean " + near + "?"
		}
		problems = append(problems, SettingError{name, reason})
	}
	slices.SortFunc(problems, func(a, b SettingError) int { return strings.Compare(a.Name, b.Name) })
	return problems
}

// nearest gives the known name with the fewest edits, or none when even that
// would change more than a third of what follows the prefix.
func nearest(name string, known map[string]bool) string {
	best, fewest := "", (len(name)-len(prefix)-1)/3+1
	for candidate := range known {
		d := Edits(name, candidate)
		if d < fewest || d == fewest && best != "" && candidate < best {
			best, fewest = candidate, d
		}
	}
	return best
}

// Edits counts the insertions, deletions and replacements between a and b, to
// find what somebody meant.
func Edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// Describe lists the settings in the order of the struct.
func Describe(settings Settings, local bool) []Setting {
	l := loader{local: local}
	var all []Setting
	for _, f := range fields(settings) {
		def := f.typ.Tag.Get("shown")
		if def == "" {
			def = l.defaultOf(f.typ)
		}
		all = append(all, Setting{
			Name: f.name, Default: def, Meaning: f.typ.Tag.Get("desc"), Allowed: list(f.typ.Tag, "allowed"),
		})
	}
	return all
}

// WriteSettings writes every setting with its default and meaning, as --help
// shows them.
func WriteSettings(w io.Writer, settings Settings, local bool) error {
	var text strings.Builder
	for _, s := range Describe(settings, local) {
		// Not "none", which is a value of API_AUTH.
		def := "no default"
		if s.Default != "" {
			def = "default: " + s.Default
		}
		fmt.Fprintf(&text, "  %s  (%s)\n        %s", s.Name, def, s.Meaning)
		if len(s.Allowed) > 0 {
			fmt.Fprintf(&text, " (%s)", strings.Join(s.Allowed, ", "))
		}
		text.WriteByte('\n')
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// ReportSettings writes the error of Load for people, a line for each problem,
// and says which binary's help lists all settings.
func ReportSettings(w io.Writer, name string, err error) {
	var text strings.Builder
	if wrong, ok := errors.AsType[*SettingsError](err); ok {
		fmt.Fprintf(&text, "%s: wrong settings:\n", name)
		for _, p := range wrong.Problems {
			fmt.Fprintf(&text, "  %s: %s\n", p.Name, p.Reason)
		}
	} else {
		fmt.Fprintf(&text, "%s: %v\n", name, err)
	}
	fmt.Fprintf(&text, "%s --help shows every setting.\n", name)
	// Standard error is all there is to report to.
	_, _ = io.WriteString(w, text.String())
}
