package replayer

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/service"
)

// flagInfo is one flag of the command. Values stay text until all of them are
// read together, so that everything that is wrong is said at once.
type flagInfo struct {
	name    string
	def     string // as it is parsed; empty for none
	shown   string // of a default that is not plain
	meaning string // the word in back quotes stands for the value
	list    bool   // may be repeated
	bool    bool   // stands alone
}

func filterFlags() []flagInfo {
	return []flagInfo{
		{name: "since", meaning: "received at or after `T`: RFC 3339, or a duration back from now, for instance 2h"},
		{name: "until", meaning: "received before `T`"},
		{name: "state", shown: "replayable: failed, or received and past its grace", meaning: "in this `S`tate, or one of several separated by commas"},
		{name: "status", meaning: "whose last answer had one of these `statuses`, for instance 401,5xx"},
		{name: "route", meaning: "of this `route`, or one of several separated by commas"},
		{name: "method", meaning: "with this `method`, or one of several separated by commas"},
		{name: "path", meaning: "whose path matches this `glob`: * is any bytes but /, ** any bytes, ? one byte but /"},
		{name: "id", list: true, meaning: "with this `UUID`; may be repeated, or hold several separated by commas"},
		{name: "limit", shown: "no limit", meaning: "at most `N` requests, the oldest first"},
	}
}

func sendFlags() []flagInfo {
	return []flagInfo{
		{name: "rate", def: "0", shown: "0, no limit", meaning: "send at most `N` requests a second"},
		{name: "speed", shown: "none, as fast as the API answers", meaning: "send at the pace at which requests were received, `F` times as fast: 1 as it was, 10 in a tenth of the time; not with --rate"},
		{name: "max-gap", def: "1m", meaning: "with --speed, take no pause between two requests for longer than `D`, before the factor"},
		{name: "concurrency", def: "4", meaning: "have at most `N` requests in flight"},
		{name: "max-attempts", def: "3", meaning: "send one request at most `N` times in this run"},
		{name: "order-by", shown: "the key that was captured", meaning: "keep the order of requests with the same key: header:`NAME`, or none"},
		{name: "past-blocked", def: "false", bool: true, meaning: "go on with a key though an earlier request of it is still open"},
		{name: "upstream", shown: "the API of each request's route", meaning: "send to another system at `URL`: attempts change no state then"},
		{name: "again", def: "false", bool: true, meaning: "with --upstream, send all of the selection anew: a test replay that was left unfinished is cancelled, not gone on with"},
		{name: "ignore", list: true, meaning: "with --upstream, leave what is at this JSON `PATH` out of the comparison of bodies, for instance $.items[*].id; may be repeated"},
		{name: "health-path", shown: "a connection is enough", meaning: "ask for `PATH` before requests that may have killed the API are sent: 2xx is well; for routes that name no health of their own"},
		{name: "wait", def: "0s", meaning: "wait up to `D` for requests that match and cannot be sent yet"},
		{name: "pause-limit", def: "5m", meaning: "pause for at most `D` while the API cannot be reached or asks to wait"},
		{name: "fence-timeout", def: "30s", meaning: "wait for at most `D` until all completions have reached the ledger"},
		{name: "ignore-ingress", list: true, meaning: "do not wait for the ingress with this `ID`; may be repeated"},
	}
}

var outputFlag = flagInfo{name: "output", def: "text", meaning: "report as `text` or json"}

var reasonFlag = flagInfo{name: "reason", shown: "none, required", meaning: "why, as `TEXT`; it is kept with the request"}

// addFlags puts flags on a command, with default and setting in their help.
func addFlags(cmd *cobra.Command, infos ...flagInfo) {
	for _, i := range infos {
		shown := i.shown
		if shown == "" {
			shown = i.def
		}
		if shown == "" {
			shown = "none"
		}
		usage := fmt.Sprintf("%s (default: %s; %s)", i.meaning, shown, service.ReplayName(i.name))
		switch {
		case i.list:
			cmd.Flags().StringArray(i.name, nil, usage)
		case i.bool:
			cmd.Flags().Bool(i.name, false, usage)
		default:
			cmd.Flags().String(i.name, "", usage)
		}
	}
}

// defaultOf gives a flag's default.
func defaultOf(name string) string {
	for _, i := range append(append(filterFlags(), sendFlags()...), outputFlag, reasonFlag) {
		if i.name == name {
			return i.def
		}
	}
	return ""
}

// values reads the flags of one command: from the command line, else from the
// environment, else the default. It collects what is wrong.
type values struct {
	flags    *pflag.FlagSet
	getenv   func(string) string
	problems []string
}

// text gives a value and the name by which a problem with it is reported.
func (v *values) text(name string) (value, label string) {
	f := v.flags.Lookup(name)
	if f == nil {
		return "", ""
	}
	if f.Changed {
		if list, ok := f.Value.(pflag.SliceValue); ok {
			return strings.Join(list.GetSlice(), ","), "--" + name
		}
		return f.Value.String(), "--" + name
	}
	if env := v.getenv(service.ReplayName(name)); env != "" {
		return env, service.ReplayName(name)
	}
	return defaultOf(name), "--" + name
}

func (v *values) wrong(label, value, format string, args ...any) {
	v.problems = append(v.problems, fmt.Sprintf("%s: %q %s", label, value, fmt.Sprintf(format, args...)))
}

// moment reads T: an absolute time, or a distance back from now.
func (v *values) moment(name string) (at time.Time, ago time.Duration) {
	text, label := v.text(name)
	if text == "" {
		return time.Time{}, 0
	}
	if d, err := time.ParseDuration(text); err == nil {
		if d <= 0 {
			v.wrong(label, text, "is not a duration back from now; write for instance 2h")
		}
		return time.Time{}, d
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		v.wrong(label, text, "is neither RFC 3339 nor a duration back from now; write 2006-01-02T15:04:05Z or 2h")
	}
	return at, 0
}

func (v *values) duration(name string) time.Duration {
	text, label := v.text(name)
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		v.wrong(label, text, "is not a duration; write for instance 30s or 5m")
		return 0
	}
	return d
}

// whole reads a number; empty gives 0.
func (v *values) whole(name string, least, most int) int {
	text, label := v.text(name)
	if text == "" {
		return 0
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		v.wrong(label, text, "is not a whole number from %d to %d", least, most)
		return 0
	}
	return n
}

// speed reads the factor; 0 means none.
func (v *values) speed(rate float64) float64 {
	text, label := v.text("speed")
	if text == "" {
		return 0
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || !(f >= 0.001 && f <= 1e6) {
		v.wrong(label, text, "is not a factor from 0.001 to 1000000; write for instance 1 or 10")
		return 0
	}
	if rate > 0 {
		v.problems = append(v.problems, label+": does not go with --rate; give one of them")
	}
	return f
}

// paths reads the JSON paths of --ignore.
func (v *values) paths() []JSONPath {
	texts, label := v.list("ignore")
	var paths []JSONPath
	for _, text := range texts {
		p, err := ParseJSONPath(text)
		if err != nil {
			v.wrong(label, text, "%v", err)
			continue
		}
		paths = append(paths, p)
	}
	return paths
}

// tests refuses what only a test replay has, where there is none.
func (v *values) tests(s *sending) {
	if s.upstream != nil {
		return
	}
	if upstream, _ := v.text("upstream"); upstream != "" {
		return // it is wrong, and that was said
	}
	if s.Again {
		v.problems = append(v.problems, "--again: needs --upstream; what the API has processed is not sent to it again")
	}
	if len(s.Ignore) > 0 {
		v.problems = append(v.problems, "--ignore: needs --upstream; only a test replay compares answers")
	}
}

func (v *values) rate() float64 {
	text, label := v.text("rate")
	if text == "" {
		return 0
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || !(n >= 0 && n <= 1e6) {
		v.wrong(label, text, "is not a number of requests a second; write for instance 50 or 0.5, or 0 for no limit")
		return 0
	}
	return n
}

// list splits at commas and drops empty elements.
func (v *values) list(name string) (list []string, label string) {
	text, label := v.text(name)
	for one := range strings.SplitSeq(text, ",") {
		if one = strings.TrimSpace(one); one != "" {
			list = append(list, one)
		}
	}
	return list, label
}

func (v *values) yes(name string) bool {
	text, label := v.text(name)
	b, err := strconv.ParseBool(text)
	if err != nil {
		v.wrong(label, text, "is neither true nor false")
	}
	return b
}

// orderBy reads what requests are ordered by.
func (v *values) orderBy() string {
	text, label := v.text("order-by")
	name, header := strings.CutPrefix(text, orderHeader)
	switch {
	case text == "", text == OrderNone:
	case !header || name == "" || strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' || c == ':' }):
		v.wrong(label, text, "is not allowed; write header: and the name of a header, or none")
	case header:
		return orderHeader + http.CanonicalHeaderKey(name)
	}
	return text
}

func (v *values) healthPath() string {
	text, label := v.text("health-path")
	if text != "" {
		if problem := route.CheckHealth(text); problem != "" {
			v.wrong(label, text, "%s", problem)
		}
	}
	return text
}

func (v *values) output() string {
	text, label := v.text("output")
	if text != "text" && text != "json" {
		v.wrong(label, text, "is not allowed; allowed are text and json")
	}
	return text
}

func (v *values) reason() string {
	text, label := v.text("reason")
	if strings.TrimSpace(text) == "" {
		v.problems = append(v.problems, label+": is required; say why in a few words")
	}
	return text
}

func (v *values) upstream() *url.URL {
	text, label := v.text("upstream")
	if text == "" {
		return nil
	}
	var u service.URL
	if err := u.UnmarshalText([]byte(text)); err != nil {
		v.problems = append(v.problems, label+": "+err.Error()) // the text may hold a password
		return nil
	}
	if u.Path != "" && u.Path != "/" {
		v.problems = append(v.problems, label+": has a path, which is not allowed: requests keep their own")
		return nil
	}
	u.Path = ""
	return &u.URL
}

// states of requests that may be sent, to another target or at all, and those that may be discarded.
var (
	testable    = []capture.State{capture.StateReceived, capture.StateFailed, capture.StateRejected, capture.StateProcessed}
	sendable    = []capture.State{capture.StateReceived, capture.StateFailed, capture.StateRejected}
	discardable = []capture.State{capture.StateReceived, capture.StateFailed, capture.StateRejected, capture.StateQuarantined}
)

// chooses gives the states that plan and run may choose.
func (v *values) chooses() []capture.State {
	if upstream, _ := v.text("upstream"); upstream != "" {
		return testable
	}
	return sendable
}

// replayable is the word for what a run selects when it is not told otherwise.
const replayable = "replayable"

// filter reads the filter flags. Without --state it leaves the states to the
// caller. given says whether any of them was there; the limit does not count.
func (v *values) filter(allowed []capture.State) (s Selection, given bool) {
	f := &s.Filter
	f.Since, s.SinceAgo = v.moment("since")
	f.Until, s.UntilAgo = v.moment("until")
	states, label := v.list("state")
	for _, state := range states {
		switch {
		case state == replayable:
			f.Replayable = true
		case slices.Contains(allowed, capture.State(state)):
			f.States = append(f.States, capture.State(state))
		case slices.Contains(capture.States(), capture.State(state)):
			hint := "they are closed"
			if state == string(capture.StateProcessed) {
				hint = "they are closed; a test replay with --upstream may send them"
			}
			if state == string(capture.StateQuarantined) {
				hint = "see replayer quarantine"
			}
			v.wrong(label, state, "requests cannot be chosen here (%s); allowed are %s, %s", hint, replayable, join(allowed))
		default:
			v.wrong(label, state, "is not a state; allowed are %s, %s", replayable, join(allowed))
		}
	}
	if f.Replayable && len(f.States) > 0 {
		v.wrong(label, strings.Join(states, ","), "mixes %s with states; %s alone, or states", replayable, replayable)
	}
	statuses, label := v.list("status")
	f.Statuses = capture.StatusSet(strings.Join(statuses, ","))
	if err := f.Statuses.Validate(); err != nil {
		v.wrong(label, string(f.Statuses), "does not fit: %v", err)
	}
	routes, label := v.list("route")
	for _, r := range routes {
		if !capture.ValidRoute(r) {
			v.wrong(label, r, "is not a route's name; write [a-z0-9_-], at most 32")
		}
	}
	f.Routes = routes
	f.Methods, _ = v.list("method")
	f.Path, label = v.text("path")
	if f.Path != "" && !strings.ContainsAny(f.Path[:1], "/*?") {
		v.wrong(label, f.Path, "can match no path; it begins with / or *")
	}
	ids, label := v.list("id")
	f.IDs = v.uuids(ids, label)
	if !f.Since.IsZero() && !f.Until.IsZero() && !f.Since.Before(f.Until) ||
		s.SinceAgo != 0 && s.UntilAgo != 0 && s.SinceAgo <= s.UntilAgo {
		v.problems = append(v.problems, "--since: is not before --until")
	}
	given = len(states)+len(statuses)+len(routes)+len(f.Methods)+len(ids) > 0 || f.Path != "" ||
		!f.Since.IsZero() || !f.Until.IsZero() || s.SinceAgo != 0 || s.UntilAgo != 0
	return s, given
}

func (v *values) uuids(texts []string, label string) []uuid.UUID {
	var ids []uuid.UUID
	for _, text := range texts {
		id, err := uuid.Parse(text)
		if err != nil || id == uuid.Nil {
			v.wrong(label, text, "is not a UUID")
			continue
		}
		ids = append(ids, id)
	}
	return ids
}

// limits of numbers. They keep a slip of the finger from becoming a queue that
// no memory holds.
const (
	maxLimit       = 10_000_000
	maxConcurrency = 10_000
	maxAttempts    = 1000
)

// toSend completes a filter for plan and run: without anything said of states,
// what is replayable. Who names statuses or ids asks for rejected ones too; see
// [ledger.Filter.Sendable].
func toSend(f ledger.Filter) ledger.Filter {
	f.Replayable = f.Replayable || len(f.States) == 0 && f.Statuses == "" && len(f.IDs) == 0
	return f
}

// unknownFlags names the arguments that look like flags and are none, all of
// them. The values of known ones are skipped.
func unknownFlags(args []string, flags *pflag.FlagSet) []string {
	var unknown []string
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			break
		}
		if !strings.HasPrefix(arg, "-") || arg == "-" || arg == "-h" {
			continue
		}
		name, _, hasValue := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		f := flags.Lookup(name)
		if f == nil || !strings.HasPrefix(arg, "--") {
			unknown = append(unknown, fmt.Sprintf("%s: is not a flag of this command", strings.SplitN(arg, "=", 2)[0]))
			continue
		}
		if !hasValue && f.NoOptDefVal == "" {
			i++
		}
	}
	return unknown
}

// environment reads the process's own; tests give another.
func environment(name string) string { return os.Getenv(name) }
