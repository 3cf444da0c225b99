// Package history sends load, writes down what each client was told, and
// checks it against the API's own records. It asks Holdfast nothing: whether a
// request was lost is decided by those who sent and processed it.
package history

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
)

// Sent is one request and what its client knows of it.
type Sent struct {
	Body   string // the SHA-256 of its body, which no other request has
	Status int    // 0: no answer came, or not whole; nobody promised anything
	ID     string // X-Request-UUID of the answer
	Stored string // X-Request-Stored of the answer
	Err    string
	At     time.Time
}

// Answered reports whether the client was given an answer that says the request
// is stored: from then on it must not be lost.
func (s Sent) Answered() bool { return s.Status != 0 && s.Stored != "" && s.Stored != "no" }

// Load is a number of clients, each of which sends one request after the other.
type Load struct {
	URL     string // of the ingress, with a path
	Clients int
	// Requests bounds what all clients together send; 0 means until Stop.
	Requests int
	// Pause is how long a client waits after an answer, so that a load has a
	// length in time too.
	Pause time.Duration
	// Size is the least size of a body in bytes; every LargeEvery-th one has at
	// least LargeSize, none if that is 0.
	Size, LargeEvery, LargeSize int
	Seed                        uint64

	mu      sync.Mutex
	sent    []Sent
	next    int
	stopped chan struct{}
	once    sync.Once
	wg      sync.WaitGroup
}

// Start lets the clients begin.
func (l *Load) Start() {
	l.stopped = make(chan struct{})
	for range l.Clients {
		l.wg.Go(l.client)
	}
}

// Stop lets each client finish its request, and waits for them.
func (l *Load) Stop() {
	l.once.Do(func() { close(l.stopped) })
	l.wg.Wait()
}

// Wait waits until all requests are sent.
func (l *Load) Wait() { l.wg.Wait() }

// Count is how many requests have ended so far, and how many of them without a
// good answer.
func (l *Load) Count() (ended, failed int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.sent {
		if s.Status == 0 || s.Status >= 500 {
			failed++
		}
	}
	return len(l.sent), failed
}

// Sent is the history so far, in the order in which the requests ended.
func (l *Load) Sent() []Sent {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.sent)
}

func (l *Load) client() {
	// A connection of its own; no retries: a POST without Idempotency-Key is
	// never repeated by net/http once a byte was sent.
	transport := &http.Transport{MaxIdleConnsPerHost: 1}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 2 * time.Minute}
	for {
		select {
		case <-l.stopped:
			return
		default:
		}
		l.mu.Lock()
		n := l.next
		if l.Requests > 0 && n >= l.Requests {
			l.mu.Unlock()
			return
		}
		l.next++
		l.mu.Unlock()
		s := l.send(client, n)
		l.mu.Lock()
		l.sent = append(l.sent, s)
		l.mu.Unlock()
		if l.Pause > 0 || s.Status == 0 {
			// After a broken connection a client does not hammer.
			timer := time.NewTimer(max(l.Pause, time.Millisecond))
			select {
			case <-timer.C:
			case <-l.stopped:
				timer.Stop()
			}
		}
	}
}

func (l *Load) send(client *http.Client, n int) Sent {
	body := fmt.Sprintf("request %d of seed %d\n", n, l.Seed)
	size := l.Size
	if l.LargeEvery > 0 && n%l.LargeEvery == 0 {
		size = l.LargeSize
	}
	if pad := size - len(body); pad > 0 {
		body += strings.Repeat(".", pad)
	}
	sum := sha256.Sum256([]byte(body))
	s := Sent{Body: hex.EncodeToString(sum[:]), At: time.Now()}
	resp, err := client.Post(l.URL, "text/plain", strings.NewReader(body))
	if err != nil {
		s.Err = err.Error()
		return s
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		s.Err = err.Error() // an answer that was cut short is no answer
		return s
	}
	s.Status = resp.StatusCode
	s.ID, s.Stored = resp.Header.Get("X-Request-UUID"), resp.Header.Get("X-Request-Stored")
	return s
}

// Verdict is what clients and API together know.
type Verdict struct {
	Sent      int // requests
	Answered  int // of them with an answer that said: stored
	Failed    int // of them with an answer of 5xx
	Unknown   int // without an answer
	FirstTry  int // processed by their first attempt
	Replayed  int // processed by a later one
	Repeated  int // ids that arrived again after they had been processed
	Lost      []Sent
	Invented  []string // ids processed that nobody sent
	Truncated []string // ids that arrived with a body nobody sent
	Doubled   []string // ids of bodies that were processed under another id before
	Mistaken  []Sent   // answers whose id is that of another body
	// Again are ids that were replayed although the client had a whole 2xx answer
	// other than 202. Where the API reports completion by its answers that is a
	// mistake, and not where it reports by events.
	Again []string
}

// Check judges a history against the API's database and arrivals, both by
// path. A request is lost when its client was given an answer that said it is
// stored and the API never processed it.
func Check(ctx context.Context, sent []Sent, db string) (Verdict, error) {
	v := Verdict{Sent: len(sent)}
	bodies := make(map[string]bool, len(sent)) // body → processed
	for _, s := range sent {
		bodies[s.Body] = false
		switch {
		case s.Status == 0:
			v.Unknown++
		case s.Status >= 500:
			v.Failed++
		}
		if s.Answered() {
			v.Answered++
		}
	}
	processedBy := map[string]int{} // id → attempt
	bodyOf := map[string]string{}   // id → body
	for after := int64(0); ; {
		rows, err := exampleapi.ReadRows(ctx, db, after, 1000, false)
		if err != nil {
			return Verdict{}, fmt.Errorf("check a history: %w", err)
		}
		if len(rows) == 0 {
			break
		}
		for _, row := range rows {
			after = row.Seq
			if _, ok := bodies[row.SHA256]; !ok {
				v.Invented = append(v.Invented, row.ID)
				continue
			}
			if bodies[row.SHA256] {
				v.Doubled = append(v.Doubled, row.ID)
			}
			bodies[row.SHA256] = true
			bodyOf[row.ID] = row.SHA256
			processedBy[row.ID] = row.Attempt
			if row.Attempt > 1 {
				v.Replayed++
			} else {
				v.FirstTry++
			}
		}
	}
	told := map[string]bool{} // id → its client knows that it was processed
	for _, s := range sent {
		told[s.ID] = s.Answered() && s.Status < 300 && s.Status != http.StatusAccepted
	}
	repeated := map[string]bool{}
	again := map[string]bool{}
	for after := int64(0); ; {
		arrivals, err := exampleapi.ReadArrivals(exampleapi.ArrivalsFile(db), after, 1000)
		if err != nil {
			return Verdict{}, fmt.Errorf("check a history: %w", err)
		}
		if len(arrivals) == 0 {
			break
		}
		for _, a := range arrivals {
			after = a.Seq
			if _, ok := bodies[a.SHA256]; !ok && !a.Incomplete {
				v.Truncated = append(v.Truncated, a.ID)
			}
			if told[a.ID] && a.Attempt > 1 && !again[a.ID] {
				again[a.ID] = true
				v.Again = append(v.Again, a.ID)
			}
			if by, ok := processedBy[a.ID]; ok && a.Attempt > by && !repeated[a.ID] {
				repeated[a.ID] = true
				v.Repeated++
			}
		}
	}
	for _, s := range sent {
		if s.Answered() && !bodies[s.Body] {
			v.Lost = append(v.Lost, s)
		}
		if body, ok := bodyOf[s.ID]; ok && body != s.Body {
			v.Mistaken = append(v.Mistaken, s)
		}
	}
	return v, nil
}

// Err says what must never be, and is nil when it is not.
func (v Verdict) Err() error {
	var errs []error
	if len(v.Lost) > 0 {
		errs = append(errs, fmt.Errorf("%d of %d answered requests are lost, the first is %+v", len(v.Lost), v.Answered, v.Lost[0]))
	}
	if len(v.Invented) > 0 {
		errs = append(errs, fmt.Errorf("%d requests were processed that nobody sent, the first is %s", len(v.Invented), v.Invented[0]))
	}
	if len(v.Truncated) > 0 {
		errs = append(errs, fmt.Errorf("%d requests arrived with a body that nobody sent, the first is %s", len(v.Truncated), v.Truncated[0]))
	}
	if len(v.Doubled) > 0 {
		errs = append(errs, fmt.Errorf("%d requests were processed under two ids, the first is %s", len(v.Doubled), v.Doubled[0]))
	}
	if len(v.Mistaken) > 0 {
		errs = append(errs, fmt.Errorf("%d answers have the id of another request, the first is %+v", len(v.Mistaken), v.Mistaken[0]))
	}
	return errors.Join(errs...)
}

// String is a table for people.
func (v Verdict) String() string {
	var b bytes.Buffer
	for _, line := range []struct {
		name string
		n    int
	}{
		{"sent", v.Sent},
		{"answered and stored", v.Answered},
		{"  of them as failed (5xx)", v.Failed},
		{"without an answer", v.Unknown},
		{"processed at first try", v.FirstTry},
		{"processed by replay", v.Replayed},
		{"repeated (one effect)", v.Repeated},
		{"lost", len(v.Lost)},
	} {
		fmt.Fprintf(&b, "  %-26s %6d\n", line.name, line.n)
	}
	return b.String()
}
