package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// largeBody is the size of one body: 32 chunks.
const largeBody = 8 << 20

// memoryLimit is what standalone may take at most while large bodies pass.
const memoryLimit = 300 // MiB

// bodies sends so many bytes of large bodies through standalone, and says what
// memory that took. Half of them come with a length, half without.
func (b *bench) bodies(ctx context.Context, total int64) error {
	addr, err := proc.FreeAddr()
	if err != nil {
		return err
	}
	api, err := proc.Start(proc.Spec{
		Name: "exampleapi", Path: filepath.Join(b.bin, "exampleapi"), Dir: b.dir,
		Args: []string{"-addr", addr, "-db", filepath.Join(b.dir, "api.db"), "-discard-bodies"},
	})
	if err != nil {
		return err
	}
	defer api.Kill()
	if err := proc.AwaitHTTP(ctx, api, "http://"+addr+"/stats"); err != nil {
		return err
	}
	s, err := harness.New(harness.Options{
		Topology: harness.Standalone, Bin: b.bin, Dir: filepath.Join(b.dir, "bodies"), Upstream: "http://" + addr,
		Settings: map[string]string{"STREAM_MAX_BYTES": "2GiB", "SPOOL_MAX_BYTES": "2GiB", "KEEP_PROCESSED_BYTES": "1GiB"},
	})
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.Start(ctx); err != nil {
		return err
	}
	began := time.Now()
	var left, refused atomic.Int64
	left.Store(total)
	var wg sync.WaitGroup
	errs := make(chan error, 8)
	for client := range cap(errs) {
		wg.Go(func() { errs <- send(ctx, s.IngressURL(), client%2 == 0, &left, &refused) })
	}
	wg.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	if err != nil {
		return err
	}
	took := time.Since(began)
	if err := drained(ctx, s); err != nil {
		return err
	}
	rss := peakRSS([]int{s.Process(harness.Ingress).Pid()})
	fmt.Printf("%.1f GiB in bodies of %d MiB: %.0f MiB/s, peak memory of standalone %.0f MiB (limit %d), %d refusals for want of room, recorded after %s\n",
		float64(total)/(1<<30), largeBody>>20, float64(total)/(1<<20)/took.Seconds(), rss, memoryLimit, refused.Load(), time.Since(began).Round(time.Second))
	if rss > memoryLimit {
		return fmt.Errorf("standalone took %.0f MiB, more than %d", rss, memoryLimit)
	}
	return nil
}

func send(ctx context.Context, url string, known bool, left, refused *atomic.Int64) error {
	for left.Add(-largeBody) > -largeBody {
		for {
			body := io.LimitReader(zeros{}, largeBody)
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/bodies", body)
			if err != nil {
				return fmt.Errorf("send a body: %w", err)
			}
			if known {
				req.ContentLength = largeBody
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return fmt.Errorf("send a body: %w", err)
			}
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if err != nil {
				return fmt.Errorf("send a body: %w", err)
			}
			if resp.StatusCode < 300 {
				break
			}
			if resp.StatusCode != http.StatusServiceUnavailable {
				return fmt.Errorf("send a body: status %d", resp.StatusCode)
			}
			// The spool is full: the ledger is slower than the load. The client
			// is told to come again, and does, sooner than it was told.
			refused.Add(1)
			timer := time.NewTimer(200 * time.Millisecond)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return ctx.Err()
			}
		}
	}
	return nil
}

// zeros is an endless body.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
