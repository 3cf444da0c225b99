package completion_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/holdfast-io/holdfast/pkg/completion"
)

// An acker that prints what it is told; a real one comes with Holdfast.
func printingAcker() *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			fmt.Println(err)
		}
		fmt.Printf("%s\n", body)
		w.WriteHeader(http.StatusAccepted)
	}))
}

// An API reports by what its handlers answer.
func Example() {
	acker := printingAcker()
	defer acker.Close()

	client, err := completion.New(completion.Options{URL: acker.URL, Token: "secret"})
	if err != nil {
		fmt.Println(err)
		return
	}
	api := completion.Middleware(client)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Store the work and the UUID in one transaction here, commit, answer.
		if req, ok := completion.FromContext(r.Context()); ok {
			fmt.Println("storing", req.ID)
		}
		w.WriteHeader(http.StatusCreated)
	}))

	r := httptest.NewRequest(http.MethodPost, "/calls", nil)
	r.Header.Set("X-Request-UUID", "01890000-0000-7000-8000-000000000001") // set by the ingress
	api.ServeHTTP(httptest.NewRecorder(), r)

	// At the end of the API: deliver what is queued, for at most ten seconds.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := client.Close(ctx); err != nil {
		fmt.Println(err)
	}
	// Output:
	// storing 01890000-0000-7000-8000-000000000001
	// [{"id":"01890000-0000-7000-8000-000000000001","outcome":"processed","attempt":1}]
}

// A handler that answers first and works later takes the report over.
func ExampleHold() {
	acker := printingAcker()
	defer acker.Close()
	client, err := completion.New(completion.Options{URL: acker.URL})
	if err != nil {
		fmt.Println(err)
		return
	}
	jobs := make(chan completion.Request, 1)
	api := completion.Middleware(client)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if req, ok := completion.Hold(r.Context()); ok {
			jobs <- req
		}
		w.WriteHeader(http.StatusAccepted)
	}))

	r := httptest.NewRequest(http.MethodPost, "/exports", nil)
	r.Header.Set("X-Request-UUID", "01890000-0000-7000-8000-000000000002")
	r.Header.Set("X-Request-Attempt", "2")
	api.ServeHTTP(httptest.NewRecorder(), r)

	req := <-jobs // somewhere else, when the work is done
	if err := client.Report(req.Event(completion.Failed, "printer on fire")); err != nil {
		fmt.Println(err)
	}
	if err := client.Close(context.Background()); err != nil {
		fmt.Println(err)
	}
	// Output: [{"id":"01890000-0000-7000-8000-000000000002","outcome":"failed","attempt":2,"detail":"printer on fire"}]
}

// A worker waits until its word is durable.
func ExampleClient_ReportNow() {
	acker := printingAcker()
	defer acker.Close()
	client, err := completion.New(completion.Options{URL: acker.URL})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close(context.Background()) // nothing is queued: it returns at once

	event := completion.Event{ID: "01890000-0000-7000-8000-000000000003", Outcome: completion.Processed}
	if err := client.ReportNow(context.Background(), event); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("durable")
	// Output:
	// [{"id":"01890000-0000-7000-8000-000000000003","outcome":"processed","attempt":1}]
	// durable
}
