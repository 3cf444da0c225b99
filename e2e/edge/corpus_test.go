package edge_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/edge"
)

// answerWait bounds the wait for a single answer: what is not there by then is
// missing. Only failures wait for so long. Where nearly everything fails the rest
// is not tried.
const (
	answerWait = 10 * time.Second
	laneWait   = 60 * time.Second
)

// final is one answer that a case wants.
type final struct {
	statuses []int
	head     bool // to a HEAD request
	refusal  bool // made by the ingress
	optional bool
}

// wanted is a case's Want, parsed.
type wanted struct {
	interim []int
	finals  []final
	end     string
	arrives int
}

func parse(t *testing.T, c edge.Case) (w wanted) {
	words := strings.Fields(c.Want)
	w.end = words[len(words)-1]
	require.Contains(t, []string{"keep", "close", "any"}, w.end, c.Name)
	for _, word := range words[:len(words)-1] {
		var f final
		word, f.optional = strings.CutPrefix(word, "?")
		word, f.refusal = strings.CutPrefix(word, "!")
		f.refusal = f.refusal || f.optional
		word, f.head = strings.CutSuffix(word, "h")
		for one := range strings.SplitSeq(word, "|") {
			status, err := strconv.Atoi(one)
			require.NoError(t, err, c.Name)
			f.statuses = append(f.statuses, status)
		}
		if f.statuses[0] < 200 {
			w.interim = append(w.interim, f.statuses[0])
			continue
		}
		if !f.refusal {
			w.arrives++
		}
		w.finals = append(w.finals, f)
	}
	return w
}

// lane is one way to the API, over which the cases go one after another, so
// that whatever arrives belongs to the case under way.
type lane struct {
	addr string
	api  *edge.API
	// ours is the lane through the ingress, which does what the case wants. Of the
	// others nothing is known before: they are told that nothing more is sent,
	// and say all that they have to say.
	ours bool
}

// outcome is what came of a case over a lane.
type outcome struct {
	finals   []edge.Answer
	interim  []edge.Answer
	arrivals []edge.Arrival
	broken   int
	kept     bool // the connection took another request
	closed   bool // the other side closed it
	took     time.Duration
	err      error
}

// run sends all cases.
func (l *lane) run(cases []edge.Case, wants []wanted) []outcome {
	all := make([]outcome, len(cases))
	end := time.Now().Add(laneWait)
	for i := range cases {
		if time.Now().After(end) {
			all[i].err = errors.New("not tried: the cases before took too long")
			continue
		}
		l.api.Answer(cases[i].Reply)
		begin := time.Now()
		all[i] = l.exchange(cases[i], wants[i])
		all[i].took = time.Since(begin)
		arrivals, broken := l.api.Take()
		if cases[i].Reply.Early {
			// The answer may be here first, and then nobody needs the rest.
			for end := time.Now().Add(answerWait); len(arrivals)+len(broken) == 0 && time.Now().Before(end); arrivals, broken = l.api.Take() {
				runtime.Gosched()
			}
			arrivals, broken = append(arrivals, broken...), nil
		}
		all[i].arrivals, all[i].broken = arrivals, len(broken)
	}
	return all
}

func (l *lane) exchange(c edge.Case, w wanted) (o outcome) {
	conn, err := net.Dial("tcp", l.addr)
	if err != nil {
		o.err = err
		return o
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(answerWait))
	goOn := make(chan struct{}, len(c.Then)+1)
	var writer sync.WaitGroup
	defer writer.Wait()
	defer conn.Close()
	defer close(goOn)
	writer.Go(func() {
		// Who refuses a request need not read it: errors tell nothing.
		_, _ = io.WriteString(conn, c.Send)
		for _, part := range c.Then {
			if _, ok := <-goOn; !ok {
				return
			}
			_, _ = io.WriteString(conn, part)
		}
		if c.HalfClose || !l.ours {
			_ = conn.(*net.TCPConn).CloseWrite()
		}
	})

	br := bufio.NewReader(conn)
	next := func() (more bool) {
		method := "GET"
		if n := len(o.finals); n < len(w.finals) && w.finals[n].head {
			method = "HEAD"
		}
		a, err := edge.ReadAnswer(br, method)
		switch {
		case isEnd(err):
			o.closed = true
			return false
		case err != nil:
			o.err = fmt.Errorf("answer %d: %w", len(o.finals)+1, err)
			return false
		case a.Status == 100:
			select {
			case goOn <- struct{}{}:
			default:
			}
		case a.Status < 200:
			o.interim = append(o.interim, a)
			return true
		}
		if a.Status >= 200 {
			o.finals = append(o.finals, a)
		}
		return true
	}
	// An answer without the word closes the connection of an HTTP/1.0 client only.
	closing := func() bool {
		return w.end == "close" && (len(o.finals) == 0 || o.finals[len(o.finals)-1].Fields.Has("Connection", "close"))
	}
	for !l.ours || len(o.finals) < len(w.finals) || closing() {
		if !next() {
			return o
		}
	}
	if w.end == "any" {
		return o
	}
	// What comes before the answer to this one was not asked for.
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", edge.Sentinel, edge.Authority); err != nil {
		o.err = fmt.Errorf("send another request: %w", err)
		return o
	}
	for n := len(o.finals); next(); {
		if last := o.finals[len(o.finals)-1]; len(o.finals) > n && bytes.Equal(last.Body, []byte("sentinel\n")) {
			o.finals, o.kept = o.finals[:len(o.finals)-1], true
			return o
		}
	}
	return o
}

// isEnd reports whether the error is a connection's end: with what the other
// side did not care to read it is a reset.
func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || err != nil && strings.Contains(err.Error(), "reset by peer")
}

// Every exchange of the corpus goes to the API directly, through nginx and
// through the ingress. What the ingress passes on differs from what was sent
// only in what edge.Allowed lists; what it refuses, the API never sees, nor
// anything behind it; and where nginx decides otherwise, the case says why that
// is right.
func TestCorpus(t *testing.T) {
	cases := edge.Cases()
	require.GreaterOrEqual(t, len(cases), 150)
	wants := make([]wanted, len(cases))
	unique := map[string]bool{}
	for i, c := range cases {
		wants[i] = parse(t, c)
		require.False(t, unique[c.Class+"/"+c.Name], "%s/%s", c.Class, c.Name)
		unique[c.Class+"/"+c.Name] = true
	}

	apis := make([]*edge.API, 3)
	for i := range apis {
		var err error
		apis[i], err = edge.Listen()
		require.NoError(t, err)
		t.Cleanup(apis[i].Close)
	}
	system := startSystem(t, apis[2].URL())
	lanes := []*lane{
		{addr: apis[0].Addr(), api: apis[0]},
		{addr: startNginx(t, apis[1].Addr()), api: apis[1]},
		{addr: strings.TrimPrefix(system.IngressURL(), "http://"), api: apis[2], ours: true},
	}
	outcomes := make([][]outcome, len(lanes))
	var all sync.WaitGroup
	for i, l := range lanes {
		all.Go(func() {
			begin := time.Now()
			outcomes[i] = l.run(cases, wants)
			t.Logf("lane %d: %s", i, time.Since(begin))
		})
	}
	all.Wait()

	used := map[string]bool{}
	for i, c := range cases {
		t.Run(c.Class+"/"+c.Name, func(t *testing.T) {
			x := exchange{t, c, wants[i], outcomes[0][i], outcomes[1][i], outcomes[2][i], used}
			x.check()
		})
	}
	t.Run("every difference is needed", func(t *testing.T) {
		for _, d := range edge.Allowed() {
			require.True(t, used[d.Key()], "%s: no exchange differs in it", d.Key())
		}
	})
	// Nothing is on its way any more when the ingress has gone.
	t.Run("nothing arrives late", func(t *testing.T) {
		require.NoError(t, system.Stop())
		require.True(t, apis[2].Drain(patience))
		arrivals, broken := apis[2].Take()
		require.Empty(t, starts(arrivals))
		require.Empty(t, starts(broken))
	})
}

// exchange is a case with what came of it.
type exchange struct {
	t                  *testing.T
	c                  edge.Case
	w                  wanted
	direct, nginx, got outcome
	used               map[string]bool
}

func (x *exchange) check() {
	t, got := x.t, x.got
	t.Logf("sent %.1000q\nAPI saw %.200q\nclient saw %v\nnginx: %d arrivals, answers %v\ntook %s direct, %s nginx, %s ingress", x.c.Send, starts(got.arrivals),
		statuses(got.finals), len(x.nginx.arrivals), statuses(x.nginx.finals), x.direct.took, x.nginx.took, x.got.took)
	require.NoError(t, got.err, "%.1000q", x.c.Send)
	x.answers()
	require.Equal(t, x.w.arrives, len(got.arrivals), "arrivals at the API: %.1000q", starts(got.arrivals))
	switch x.w.end {
	case "keep":
		require.True(t, got.kept, "the connection must take another request")
	case "close":
		require.True(t, got.closed, "the connection must be closed")
	}
	for _, a := range got.arrivals {
		require.Empty(t, a.Anomalies, "%.1000q", a.Raw)
	}
	if !slices.ContainsFunc(x.w.finals, func(f final) bool { return f.refusal }) {
		require.Zero(t, got.broken, "requests that did not arrive whole")
	}

	n := 0
	for i, f := range x.w.finals {
		if f.refusal {
			break
		}
		require.Less(t, n, len(x.direct.arrivals), "the case is wrong: the API alone does not see this request")
		require.Less(t, i, len(x.direct.finals), "the case is wrong: the API alone does not answer this request")
		x.compare(edge.Pair{Direct: x.direct.arrivals[n], Got: got.arrivals[n], DirectAnswer: x.direct.finals[i], GotAnswer: got.finals[i]})
		n++
	}
	x.interim()

	if len(x.nginx.arrivals) == len(got.arrivals) {
		require.Empty(t, x.c.Nginx, "nginx decides alike: the reason is not needed")
	} else {
		require.NotEmpty(t, x.c.Nginx, "through nginx %d requests arrive, and its answers are %v", len(x.nginx.arrivals), statuses(x.nginx.finals))
	}
}

// answers looks at the answers one by one.
func (x *exchange) answers() {
	t, finals := x.t, x.got.finals
	wants := x.w.finals
	if len(finals) < len(wants) && wants[len(wants)-1].optional {
		wants = wants[:len(wants)-1]
	}
	require.Equal(t, len(wants), len(finals), "answers: %v", statuses(finals))
	for i, f := range wants {
		a := finals[i]
		require.Contains(t, f.statuses, a.Status, "%s\n%s", a.Start, a.Body)
		require.Equal(t, "HTTP/1.1", a.Version)
		require.Empty(t, a.Anomalies)
		status := strings.Join(a.Fields.Values("Proxy-Status"), ", ")
		if !f.refusal {
			require.NotContains(t, status, "holdfast")
			continue
		}
		require.Equal(t, "holdfast; error=http_request_error", status)
		require.Equal(t, []string{"application/problem+json"}, a.Fields.Values("Content-Type"))
		var problem struct{ Status int }
		require.NoError(t, json.Unmarshal(a.Body, &problem))
		require.Equal(t, a.Status, problem.Status)
		require.True(t, a.Fields.Has("Connection", "close") || x.w.end != "close", "%s", a.Raw)
	}
}

// interim compares interim answers. Those with status 100 are between neighbours.
func (x *exchange) interim() {
	if len(x.direct.arrivals) > 0 && x.direct.arrivals[0].Version == "HTTP/1.0" {
		require.Empty(x.t, statuses(x.got.interim))
		return
	}
	if x.w.arrives == 0 {
		return
	}
	require.Equal(x.t, statuses(x.direct.interim), statuses(x.got.interim))
	for i, a := range x.got.interim {
		require.Equal(x.t, x.direct.interim[i].Start, a.Start)
		for _, f := range x.direct.interim[i].Fields {
			require.Contains(x.t, a.Fields, f)
		}
	}
}

// compare compares one request and its answer.
func (x *exchange) compare(p edge.Pair) {
	t := x.t
	require.Equal(t, p.Direct.Method, p.Got.Method)
	require.Equal(t, originForm(p.Direct), p.Got.Target)
	require.Equal(t, "HTTP/1.1", p.Got.Version)
	if x.c.Reply.Early {
		p.Direct.Body = p.Direct.Body[:min(len(p.Direct.Body), len(p.Got.Body))]
	}
	require.True(t, bytes.Equal(p.Direct.Body, p.Got.Body), "the body differs: %.200q, %.200q", p.Direct.Body, p.Got.Body)
	require.Equal(t, p.DirectAnswer.Status, p.GotAnswer.Status)
	require.Equal(t, p.DirectAnswer.Reason, p.GotAnswer.Reason)
	if x.c.Reply.Raw == "" {
		// It is the answer to this request, and to no other.
		want, err := json.Marshal(p.Got)
		require.NoError(t, err)
		if p.Got.Method == "HEAD" {
			want = nil
		}
		require.Equal(t, string(want), string(p.GotAnswer.Body))
		// Its length tells of what differs in the request.
		p.DirectAnswer.Body = want
		p.DirectAnswer.Fields = slices.Clone(p.DirectAnswer.Fields)
		if p.Got.Method == "HEAD" {
			p.DirectAnswer.Fields = without(p.DirectAnswer.Fields, "Content-Length")
			p.GotAnswer.Fields = without(p.GotAnswer.Fields, "Content-Length")
		}
	} else {
		require.True(t, bytes.Equal(p.DirectAnswer.Body, p.GotAnswer.Body), "the answer's body differs: %.200q, %.200q", p.DirectAnswer.Body, p.GotAnswer.Body)
	}
	x.fields(p, edge.InRequest, p.Direct.Fields, p.Got.Fields)
	x.fields(p, edge.InRequestTrailers, p.Direct.Trailers, p.Got.Trailers)
	x.fields(p, edge.InAnswer, p.DirectAnswer.Fields, p.GotAnswer.Fields)
	if p.Direct.Version != "HTTP/1.0" { // which knows no trailers
		x.fields(p, edge.InAnswerTrailers, p.DirectAnswer.Trailers, p.GotAnswer.Trailers)
	}
}

func without(f edge.Fields, name string) edge.Fields {
	return slices.DeleteFunc(slices.Clone(f), func(f edge.Field) bool { return strings.EqualFold(f.Name, name) })
}

// fields compares the fields of one part: those that may differ by name, all
// others as a whole, with their order and spelling.
func (x *exchange) fields(p edge.Pair, part string, direct, got edge.Fields) {
	t := x.t
	var names []string
	add := func(name string) {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, f := range append(slices.Clone(direct), got...) {
		add(strings.ToLower(f.Name))
	}
	for _, a := range edge.Allowed() {
		if slices.Contains(a.Parts, part) {
			for _, name := range a.Always {
				add(name)
			}
		}
	}
	for _, name := range names {
		d, g := direct.Values(name), got.Values(name)
		wrong := ""
		for _, a := range edge.Allowed() {
			if !slices.Contains(a.Parts, part) || !a.Names(p, name) {
				continue
			}
			if a.Right(p, name, d, g) {
				if !slices.Equal(d, g) || a.Moves {
					x.used[a.Key()] = true
					direct, got = without(direct, name), without(got, name)
				}
				wrong = ""
				break
			}
			if !a.Optional {
				wrong = a.Key()
			}
		}
		require.Empty(t, wrong, "%s: %s must not be %q where it is %q directly", part, name, g, d)
	}
	require.Equal(t, text(direct), text(got), "%s: fields that must not differ", part)
}

func text(f edge.Fields) string {
	var b strings.Builder
	for _, one := range f {
		fmt.Fprintf(&b, "%q: %q\n", one.Name, one.Value)
	}
	return b.String()
}

// originForm is the target that the API must see (RFC 9112 section 3.2).
func originForm(a edge.Arrival) string {
	_, rest, ok := strings.Cut(a.Target, "://")
	if !ok || strings.HasPrefix(a.Target, "/") {
		return a.Target
	}
	i := strings.IndexAny(rest, "/?")
	switch {
	case i < 0 && a.Method == "OPTIONS":
		return "*"
	case i < 0:
		return "/"
	case rest[i] == '?':
		return "/" + rest[i:]
	}
	return rest[i:]
}

func starts(list []edge.Arrival) (all []string) {
	for _, a := range list {
		all = append(all, a.Start)
	}
	return all
}

func statuses(list []edge.Answer) (all []int) {
	for _, a := range list {
		all = append(all, a.Status)
	}
	return all
}
