package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-io/holdfast/e2e/edge"
	"github.com/holdfast-io/holdfast/e2e/harness"
)

// vitals are what an ingress says of itself.
type vitals struct{ rss, goroutines, connections, inflight float64 }

func readVitals(ctx context.Context, s *harness.System) (v vitals, err error) {
	for name, into := range map[string]*float64{
		"process_resident_memory_bytes": &v.rss, "go_goroutines": &v.goroutines,
		"holdfast_connections": &v.connections, "holdfast_inflight_bytes": &v.inflight,
	} {
		if *into, err = s.Metric(ctx, harness.Ingress, name); err != nil {
			return v, err
		}
	}
	return v, nil
}

func (v vitals) String() string {
	return fmt.Sprintf("%.1f MiB, %.0f goroutines, %.0f connections, %.0f bytes in flight", v.rss/(1<<20), v.goroutines, v.connections, v.inflight)
}

// startIngress starts an ingress and its broker. Nobody records.
func (b *bench) startIngress(ctx context.Context, name, api string, settings map[string]string) (*harness.System, error) {
	o := harness.Options{
		Topology: harness.Distributed, Bin: b.bin, NATSServer: b.natsServer, Dir: filepath.Join(b.dir, name), Upstream: api,
		Settings: map[string]string{"STREAM_MAX_BYTES": "8GiB", "SPOOL_MAX_BYTES": "4GiB", "ACCESS_LOG": "off"},
	}
	for k, v := range settings {
		o.Settings[k] = v
	}
	s, err := harness.New(o)
	if err != nil {
		return nil, err
	}
	if err := s.Start(ctx, harness.NATS, harness.Ingress); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// loadIngress is load, with the CPU of ingress and broker.
func (b *bench) loadIngress(ctx context.Context, s *harness.System, url string, d time.Duration) (figures, error) {
	pids := []int{s.Process(harness.NATS).Pid(), s.Process(harness.Ingress).Pid()}
	before := cpu(pids)
	f, err := b.load(ctx, url, d)
	f.CPU = (cpu(pids) - before).Seconds() * 1e6 / (f.RequestsPerSecond * d.Seconds())
	return f, err
}

// idle measures what so many idle connections cost an ingress, and a tenth as
// many over TLS: memory, goroutines, and the latency of others' requests beside
// that without them.
func (b *bench) idle(ctx context.Context, n int) error {
	if err := edge.EnoughFiles(n); err != nil {
		return err
	}
	api, err := b.startNginx(ctx, "api", "location / { return 200 ok; }", "")
	if err != nil {
		return err
	}
	defer api.stop()
	certFile, keyFile, err := b.certificate()
	if err != nil {
		return err
	}
	// They must not end before they are counted, however slow the machine.
	settings := map[string]string{"IDLE_TIMEOUT": "1h", "MAX_CONNECTIONS": fmt.Sprint(n + 1000)}
	if err := b.idleOn(ctx, "plain", api.url, n, settings, nil); err != nil {
		return fmt.Errorf("plain: %w", err)
	}
	settings["TLS_CERT_FILE"], settings["TLS_KEY_FILE"] = certFile, keyFile
	// The certificate is this program's own, and it is not what is measured.
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}
	if err := b.idleOn(ctx, "TLS", api.url, n/10, settings, config); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	return nil
}

func (b *bench) idleOn(ctx context.Context, name, api string, n int, settings map[string]string, config *tls.Config) error {
	s, err := b.startIngress(ctx, name, api, settings)
	if err != nil {
		return err
	}
	defer s.Close()
	addr := strings.TrimPrefix(s.IngressURL(), "http://")
	url := s.IngressURL()
	if config != nil {
		url = "https://" + addr
	}
	if _, err := b.load(ctx, url, 2*time.Second); err != nil { // connections, caches, first segments
		return err
	}
	var without, with []figures
	for round := range b.rounds {
		f, err := b.loadIngress(ctx, s, url, b.duration)
		if err != nil {
			return err
		}
		without = append(without, f)
		before, err := settledVitals(ctx, s, 0)
		if err != nil {
			return err
		}
		conns, err := edge.Idle(ctx, addr, n, config)
		var there, loaded vitals
		if err == nil {
			there, err = readVitals(ctx, s)
		}
		if err == nil && int(there.connections) != n {
			err = fmt.Errorf("%.0f connections instead of %d", there.connections, n)
		}
		if err == nil {
			f, err = b.loadIngress(ctx, s, url, b.duration)
			with = append(with, f)
		}
		if err == nil {
			loaded, err = settledVitals(ctx, s, n)
		}
		for _, nc := range conns {
			_ = nc.Close()
		}
		if err != nil {
			return err
		}
		after, err := settledVitals(ctx, s, 0)
		if err != nil {
			return err
		}
		fmt.Printf("%s, round %d, %d idle connections, %.2f goroutines each\n  before      %s\n  with        %s\n  after load  %s\n  after them  %s\n",
			name, round+1, n, (there.goroutines-before.goroutines)/float64(n), before, there, loaded, after)
		if round == 0 { // later rounds begin with the memory of those before
			fmt.Printf("  each        %.1f KiB\n", (there.rss-before.rss)/1024/float64(n))
		}
	}
	b.compare(name, without, with)
	return nil
}

// compare prints medians of a load without and with something, and their ratios.
func (b *bench) compare(name string, without, with []figures) {
	for _, of := range []struct {
		name string
		get  func(figures) float64
	}{
		{"requests/s", func(f figures) float64 { return f.RequestsPerSecond }},
		{"p50 ms", func(f figures) float64 { return f.P50 }},
		{"p99 ms", func(f figures) float64 { return f.P99 }},
		{"CPU µs", func(f figures) float64 { return f.CPU }},
		{"errors", func(f figures) float64 { return float64(f.Errors) }},
	} {
		median := func(list []figures) float64 {
			var values []float64
			for _, f := range list {
				values = append(values, of.get(f))
			}
			slices.Sort(values)
			return values[len(values)/2]
		}
		before, after := median(without), median(with)
		ratio := ""
		if before > 0 {
			ratio = fmt.Sprintf(" (%.2f)", after/before)
		}
		fmt.Printf("%s: %-10s without %.2f, with %.2f%s\n", name, of.name, before, after, ratio)
	}
}

// settledVitals reads the vitals when there are so many connections.
func settledVitals(ctx context.Context, s *harness.System, connections int) (v vitals, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		if v, err = readVitals(ctx, s); err != nil || int(v.connections) == connections {
			return v, err
		}
		timer := time.NewTimer(20 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return v, fmt.Errorf("wait for %d connections, there are %.0f: %w", connections, v.connections, ctx.Err())
		}
	}
}

// slowTimeout is each timeout for clients while slow ones are measured: long
// enough for a load while they are all there.
const slowTimeout = 8 * time.Second

// slow measures what so many clients of each slow kind cost an ingress together.
func (b *bench) slow(ctx context.Context, n int) error {
	if err := edge.EnoughFiles(n * (len(edge.Burdens) + 1)); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("start an API: %w", err)
	}
	api := &http.Server{Handler: http.HandlerFunc(okOrLarge), ReadHeaderTimeout: time.Minute}
	go func() { _ = api.Serve(l) }()
	defer api.Close()
	settings := map[string]string{}
	for _, name := range []string{"READ_HEADER_TIMEOUT", "READ_BODY_TIMEOUT", "WRITE_TIMEOUT", "IDLE_TIMEOUT"} {
		settings[name] = slowTimeout.String()
	}
	s, err := b.startIngress(ctx, "slow", "http://"+l.Addr().String(), settings)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := b.load(ctx, s.IngressURL(), 2*time.Second); err != nil { // connections, caches, first segments
		return err
	}
	var without, with []figures
	for round := range b.rounds {
		f, err := b.loadIngress(ctx, s, s.IngressURL(), min(b.duration, slowTimeout/2))
		if err != nil {
			return err
		}
		without = append(without, f)
		if f, err = b.slowRound(ctx, s, n, round); err != nil {
			return err
		}
		with = append(with, f)
	}
	b.compare("slow", without, with)
	return nil
}

// slowRound has the slow clients come, and a load while they are there.
func (b *bench) slowRound(ctx context.Context, s *harness.System, n, round int) (f figures, err error) {
	before, err := settledVitals(ctx, s, 0)
	if err != nil {
		return f, err
	}
	ctx, cancel := context.WithTimeout(ctx, 4*slowTimeout)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	type end struct {
		kind   string
		lasted time.Duration
		err    error
	}
	ends := make(chan end, n*len(edge.Burdens))
	for _, kind := range edge.Burdens {
		for range n {
			clients.Go(func() {
				lasted, err := edge.Burden(ctx, kind, strings.TrimPrefix(s.IngressURL(), "http://"))
				ends <- end{kind, lasted, err}
			})
		}
	}
	if _, err := settledVitals(ctx, s, cap(ends)); err != nil {
		return f, err
	}
	sampling, stop := context.WithCancel(ctx)
	highest := make(chan vitals, 1)
	go func() { highest <- b.highest(sampling, s) }()
	f, err = b.loadIngress(ctx, s, s.IngressURL(), min(b.duration, slowTimeout/2))
	stop()
	most := <-highest
	if err != nil {
		return f, err
	}
	longest := map[string]time.Duration{}
	for range cap(ends) {
		e := <-ends
		longest[e.kind] = max(longest[e.kind], e.lasted)
		err = errors.Join(err, e.err)
	}
	if err != nil {
		return f, err
	}
	after, err := settledVitals(ctx, s, 0)
	if err != nil {
		return f, err
	}
	fmt.Printf("slow, round %d, %d clients of each kind, timeouts of %s\n  before        %s\n  at most       %s\n  afterwards    %s\n", round+1, n, slowTimeout, before, most, after)
	for _, kind := range edge.Burdens {
		fmt.Printf("  %-32s gone after %.1f s at most\n", kind, longest[kind].Seconds())
	}
	return f, nil
}

// highest gives the largest vitals until ctx is done.
func (b *bench) highest(ctx context.Context, s *harness.System) (most vitals) {
	for {
		v, err := readVitals(ctx, s)
		if err != nil {
			return most
		}
		most = vitals{max(most.rss, v.rss), max(most.goroutines, v.goroutines), max(most.connections, v.connections), max(most.inflight, v.inflight)}
		timer := time.NewTimer(50 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return most
		}
	}
}

func okOrLarge(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	if r.URL.Path == edge.Large {
		_, _ = io.Copy(w, io.LimitReader(zeros{}, edge.LargeBytes))
	}
}

// certificate makes one that signs itself, and gives the files with it and its
// key.
func (b *bench) certificate() (certFile, keyFile string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", fmt.Errorf("make a key: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		DNSNames: []string{"localhost"}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return "", "", fmt.Errorf("make a certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", "", fmt.Errorf("encode a key: %w", err)
	}
	certFile, keyFile = filepath.Join(b.dir, "tls.crt"), filepath.Join(b.dir, "tls.key")
	err = errors.Join(
		os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600),
	)
	return certFile, keyFile, err
}
