package exampleapi

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Arrival is one request as it came in, before anything was done about it.
type Arrival struct {
	Seq     int64     `json:"seq"` // in the order of arrival, from 1, without gaps
	ID      string    `json:"id"`  // X-Request-UUID, empty without one
	Attempt int       `json:"attempt"`
	Replay  string    `json:"replay,omitempty"`
	Method  string    `json:"method"`
	Target  string    `json:"target"` // as it stood in the request line
	Bytes   int64     `json:"bytes"`
	SHA256  string    `json:"sha256"` // of the body, in hex
	At      time.Time `json:"at"`
	// Incomplete says that the body broke off; Bytes and SHA256 are of what came.
	Incomplete bool `json:"incomplete,omitempty"`
	// Key is the value of [HeaderKey], and Beside how many other replayed requests
	// of that key the API worked on when this one, a replayed one too, came.
	Key    string `json:"key,omitempty"`
	Beside int    `json:"beside,omitempty"`
}

// ArrivalsFile is where an API with the given database keeps its arrivals: one
// JSON object a line, in the order of arrival.
func ArrivalsFile(db string) string { return db + ".arrivals" }

// journal appends arrivals to a file. A line is written before the request is
// acted upon, with one write(2): it outlives a kill -9 of the process, but not
// a power cut.
type journal struct {
	mu      sync.Mutex
	file    *os.File
	seq     int64
	repeats int64
	seen    map[string]struct{} // ids that have arrived
	working map[string]int      // replayed requests under way, by key
}

// openJournal opens or creates the file. A last line without end, which a full
// disk may leave, is cut off.
func openJournal(path string) (*journal, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open arrivals: %w", err)
	}
	j := &journal{file: file, seen: map[string]struct{}{}, working: map[string]int{}}
	end, err := scanArrivals(file, func(a Arrival) { j.note(a) })
	if err == nil {
		err = file.Truncate(end)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open arrivals: %w", err)
	}
	return j, nil
}

func (j *journal) note(a Arrival) {
	j.seq = a.Seq
	if a.ID == "" {
		return
	}
	if _, ok := j.seen[a.ID]; ok {
		j.repeats++
	}
	j.seen[a.ID] = struct{}{}
}

// add gives the arrival its seq and writes it.
func (j *journal) add(a Arrival) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	a.Seq = j.seq + 1
	line, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("record arrival: %w", err)
	}
	if _, err := j.file.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("record arrival: %w", err)
	}
	j.note(a)
	return nil
}

// enter notes that a replayed request of the key is worked on, and returns how
// many others are.
func (j *journal) enter(key string) (others int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	others = j.working[key]
	j.working[key]++
	return others
}

func (j *journal) leave(key string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.working[key]--; j.working[key] == 0 {
		delete(j.working, key)
	}
}

// counts returns the number of arrivals, and how many of them had an id that
// had arrived before.
func (j *journal) counts() (arrivals, repeats int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.seq, j.repeats
}

func (j *journal) close() error { return j.file.Close() }

// ReadArrivals reads at most limit arrivals with a seq above after, in their
// order, from a file of an API, whether or not it is running.
func ReadArrivals(path string, after int64, limit int) ([]Arrival, error) {
	arrivals := []Arrival{}
	err := EachArrival(path, func(a Arrival) {
		if a.Seq > after && len(arrivals) < limit {
			arrivals = append(arrivals, a)
		}
	})
	if err != nil {
		return nil, err
	}
	return arrivals, nil
}

// EachArrival calls each for all arrivals in a file, in their order, and holds
// none of them.
func EachArrival(path string, each func(Arrival)) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read arrivals: %w", err)
	}
	defer file.Close()
	if _, err := scanArrivals(file, each); err != nil {
		return fmt.Errorf("read arrivals: %w", err)
	}
	return nil
}

// scanArrivals reads all whole lines and returns where the last one ends.
func scanArrivals(r io.Reader, each func(Arrival)) (end int64, err error) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return end, nil
		}
		if err != nil {
			return end, err
		}
		var a Arrival
		if err := json.Unmarshal(bytes.TrimSuffix(line, []byte("\n")), &a); err != nil {
			return end, fmt.Errorf("at byte %d: %w", end, err)
		}
		end += int64(len(line))
		each(a)
	}
}
