package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
	"github.com/holdfast-io/holdfast/e2e/history"
)

// poison is what a body has to contain for the API to die of it.
const poison = "poison"

// callers are clients whose requests are to keep their order: each has a key of
// its own, and sends one request after the other.
type callers struct {
	url   string
	keys  int
	pause time.Duration // after an answer

	killer  atomic.Bool // the next request of the first one is to be one that kills
	mu      sync.Mutex
	sent    []history.Sent
	killing *history.Sent // the killer, when it was sent
	behind  int           // failed ones of its key since then
	stop    chan struct{}
	wg      sync.WaitGroup
}

func (c *callers) start() {
	c.stop = make(chan struct{})
	for n := range c.keys {
		c.wg.Go(func() { c.call(n) })
	}
}

// wait lets each caller end its request.
func (c *callers) wait() {
	close(c.stop)
	c.wg.Wait()
}

// progress says whether the killer was sent, and how many requests of its key
// have failed since.
func (c *callers) progress() (sent bool, behind int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.killing != nil, c.behind
}

// history is what the callers know of their requests.
func (c *callers) history() (sent []history.Sent, killer history.Sent) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.killing != nil {
		killer = *c.killing
	}
	return slices.Clone(c.sent), killer
}

func (c *callers) call(caller int) {
	transport := &http.Transport{MaxIdleConnsPerHost: 1}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	for n := 0; ; n++ {
		select {
		case <-c.stop:
			return
		default:
		}
		body := fmt.Sprintf("call %d of caller %d", n, caller)
		kills := caller == 0 && c.killer.CompareAndSwap(true, false)
		if kills {
			body += ": " + poison
		}
		s := c.send(client, fmt.Sprintf("caller-%d", caller), body)
		c.mu.Lock()
		c.sent = append(c.sent, s)
		switch {
		case kills:
			c.killing = &s
		case caller == 0 && c.killing != nil && s.Status >= 500:
			c.behind++
		}
		c.mu.Unlock()
		timer := time.NewTimer(c.pause)
		select {
		case <-timer.C:
		case <-c.stop:
			timer.Stop()
		}
	}
}

func (c *callers) send(client *http.Client, key, body string) history.Sent {
	sum := sha256.Sum256([]byte(body))
	s := history.Sent{Body: hex.EncodeToString(sum[:]), At: time.Now()}
	req, err := http.NewRequest(http.MethodPost, c.url, strings.NewReader(body))
	if err != nil {
		s.Err = err.Error()
		return s
	}
	req.Header.Set(exampleapi.HeaderKey, key)
	resp, err := client.Do(req)
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
