package recorder_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

func TestRecordsAndGivesItsWord(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	r := w.start(nil)
	var refs []capture.SpoolRef
	var sent []*capture.Request
	for range 50 {
		one := newRequest("POST", "/v1/calls?x=%2F", "hello")
		sent = append(sent, one)
		refs = append(refs, w.capture(one))
	}
	heard.await(refs...)
	for _, one := range sent {
		d, err := w.store.Get(t.Context(), one.ID)
		require.NoError(t, err)
		require.Equal(t, capture.StateReceived, d.State)
		require.Equal(t, "/v1/calls?x=%2F", d.Target)
	}
	w.awaitAcked()
	var page struct {
		Requests []struct{ ID string } `json:"requests"`
	}
	r.get("/v1/requests?state=received&limit=1000", &page)
	require.Len(t, page.Requests, 50)
	require.Eventually(t, func() bool { return len(r.ready.Failing()) == 0 }, patience, milli)
}
