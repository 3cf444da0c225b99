package ledger_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// asRegexp is the glob as a regular expression: slower, and plainly right.
func asRegexp(glob string) *regexp.Regexp {
	var b strings.Builder
	b.WriteString(`(?s)\A`)
	for glob != "" {
		switch {
		case strings.HasPrefix(glob, "**"):
			b.WriteString(`.*`)
			glob = glob[2:]
			continue
		case glob[0] == '*':
			b.WriteString(`[^/]*`)
		case glob[0] == '?':
			b.WriteString(`[^/]`)
		default:
			b.WriteString(regexp.QuoteMeta(glob[:1]))
		}
		glob = glob[1:]
	}
	b.WriteString(`\z`)
	return regexp.MustCompile(b.String())
}

func TestPathGlobs(t *testing.T) {
	letters := func(s string) *rapid.Generator[string] {
		return rapid.StringOfN(rapid.SampledFrom([]rune(s)), 0, 12, -1)
	}
	matched := 0
	rapid.Check(t, func(t *rapid.T) {
		glob, path := letters("ab/**?").Draw(t, "glob"), letters("ab/").Draw(t, "path")
		if glob == "" {
			return // selects every path
		}
		want := asRegexp(glob).MatchString(path)
		f := ledger.Filter{Path: glob}
		require.Equal(t, want, f.Selects(&ledger.Request{Target: path}, 0), "%q over %q", glob, path)
		require.Equal(t, want, f.Selects(&ledger.Request{Target: path + "?q=/b"}, 0), "the query does not count")
		if want {
			matched++
		}
	})
	require.Positive(t, matched)
	// Bytes are bytes, and a glob that could take for ever does not.
	f := ledger.Filter{Path: "/\xff?/x"}
	require.True(t, f.Selects(&ledger.Request{Target: "/\xff\x80/x"}, 0))
	f.Path = strings.Repeat("*a", 40) + "b"
	require.False(t, f.Selects(&ledger.Request{Target: strings.Repeat("a", 4000)}, 0))
}

func TestCanonicalFilters(t *testing.T) {
	a, b := uuid.Must(uuid.NewV7()), uuid.Must(uuid.NewV7())
	one := ledger.Filter{States: []capture.State{"failed", "received"}, Routes: []string{"b", "a"}, IDs: []uuid.UUID{b, a, a}}
	other := ledger.Filter{States: []capture.State{"received", "failed", "failed"}, Routes: []string{"a", "b"}, IDs: []uuid.UUID{a, b}}
	x, err := one.Canonical()
	require.NoError(t, err)
	y, err := other.Canonical()
	require.NoError(t, err)
	require.Equal(t, x, y)
	require.Equal(t, []string{"b", "a"}, one.Routes, "the filter itself is left as it is")
	empty, err := (&ledger.Filter{}).Canonical()
	require.NoError(t, err)
	require.Equal(t, "{}", empty)
}
