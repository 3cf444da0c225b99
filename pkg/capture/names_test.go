package capture_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

func TestOwnHeadersInEverySpelling(t *testing.T) {
	own := []string{
		capture.HTTPHeaderID, capture.HTTPHeaderStored, capture.HTTPHeaderReplay, capture.HTTPHeaderAttempt, capture.HTTPHeaderReceivedAt,
	}
	rapid.Check(t, func(t *rapid.T) {
		name := []byte(rapid.SampledFrom(own).Draw(t, "name"))
		for i, c := range name {
			switch {
			case c == '-' && rapid.Bool().Draw(t, "underscore"):
				name[i] = '_'
			case c != '-' && rapid.Bool().Draw(t, "upper"):
				name[i] = strings.ToUpper(string(c))[0]
			case c != '-':
				name[i] = strings.ToLower(string(c))[0]
			}
		}
		require.True(t, capture.IsOwnHTTPHeader(string(name)), "%s", name)
	})
	for _, name := range []string{
		"", "X", "X-Request", "X-Request-ID", "X-Request-UUID2", "XX-Request-UUID", "X-Request--UUID", "X.Request.UUID", "Request-UUID",
		"8-Request-UUID",
	} {
		require.False(t, capture.IsOwnHTTPHeader(name), name)
	}
}

func TestSubjects(t *testing.T) {
	for method, want := range map[string]string{
		"POST": "holdfast.requests.calls.POST", "post": "holdfast.requests.calls.OTHER", "": "holdfast.requests.calls.OTHER",
		"M-SEARCH": "holdfast.requests.calls.OTHER", "A.B": "holdfast.requests.calls.OTHER", ">": "holdfast.requests.calls.OTHER",
		"*": "holdfast.requests.calls.OTHER", "A B": "holdfast.requests.calls.OTHER", "\x00": "holdfast.requests.calls.OTHER",
		strings.Repeat("A", 32): "holdfast.requests.calls." + strings.Repeat("A", 32), strings.Repeat("A", 33): "holdfast.requests.calls.OTHER",
	} {
		require.Equal(t, want, capture.RequestSubject("calls", method))
	}
	require.Equal(t, "calls", capture.RouteOfSubject(capture.RequestSubject("calls", "POST")))
	require.Equal(t, "calls", capture.RouteOfSubject(capture.OutcomeSubject("calls")))
	for _, subject := range []string{"", "holdfast", "holdfast.requests", "holdfast.requests.calls", "other.requests.calls.POST", "holdfast.requests..POST"} {
		require.Equal(t, capture.UnknownRoute, capture.RouteOfSubject(subject), subject)
	}
	require.True(t, capture.IsOutcomeSubject(capture.OutcomeSubject(capture.UnknownRoute)))
	require.False(t, capture.IsEventSubject(capture.OutcomeSubject("calls")))
	require.True(t, capture.IsEventSubject(capture.EventSubject("calls")))
	for _, subject := range []string{"holdfast.completions..outcome", "holdfast.completions.outcome", "holdfast.completions.a.b.outcome", "x.holdfast.completions.a.outcome"} {
		require.False(t, capture.IsOutcomeSubject(subject), subject)
	}
}

func TestNamesOfIngresses(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		host := rapid.StringN(1, -1, 200).Draw(t, "host")
		require.True(t, capture.ValidIngress(capture.IngressFromHost(host)), host)
	})
	require.Equal(t, "web-1_example_com", capture.IngressFromHost("web-1.example.com"))
	for _, bad := range []string{"", "a.b", "a b", "a*", strings.Repeat("a", 65), "a\n"} {
		require.False(t, capture.ValidIngress(bad), bad)
	}
	for route, want := range map[string]bool{"default": true, "eu_calls-2": true, "_": false, "": false, "Calls": false, strings.Repeat("a", 33): false, "a.b": false, "a\n": false} {
		require.Equal(t, want, capture.ValidRoute(route), route)
	}
}
