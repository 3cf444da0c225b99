// Package docs holds the documents to the tree: what they name must be there.
package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const root = "../.."

// source is the text of all Go files of a directory.
func source(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	var all strings.Builder
	for _, file := range files {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		all.Write(b)
	}
	return all.String()
}

// TestEachGuaranteeHasItsTest: docs/guarantees.md and docs/edge.md name tests as
// [`package TestName`] or [`package TestName/case`].
func TestEachGuaranteeHasItsTest(t *testing.T) {
	var named [][]string
	for _, file := range []string{"docs/guarantees.md", "docs/edge.md"} {
		page, err := os.ReadFile(filepath.Join(root, file))
		require.NoError(t, err)
		found := regexp.MustCompile("\\[`([a-z0-9/]+) (Test[A-Za-z0-9]+)(?:/([^`]+))?`\\]").FindAllStringSubmatch(string(page), -1)
		require.Greater(t, len(found), 20, file)
		named = append(named, found...)
	}
	for _, n := range named {
		pkg, test, sub := n[1], n[2], n[3]
		code := source(t, filepath.Join(root, pkg))
		require.Regexp(t, regexp.MustCompile(`(?m)^func `+test+`\(t \*testing\.T\)`), code, "%s names %s, which is not there", pkg, test)
		if sub != "" && test == "TestConformance" {
			code = source(t, filepath.Join(root, "pkg/ledger/ledgertest"))
		}
		require.Contains(t, code, sub, "%s has no case %q", test, sub)
	}
}

// TestEachMetricIsThere: metrics that a page names are those of the code.
func TestEachMetricIsThere(t *testing.T) {
	var code strings.Builder
	for _, dir := range []string{"ingress", "ingress/internal/edge", "recorder", "acker", "pkg/stream", "pkg/service"} {
		code.WriteString(source(t, filepath.Join(root, dir)))
	}
	for _, page := range []string{"docs/operations.md", "docs/guarantees.md", "docs/edge.md", "README.md"} {
		b, err := os.ReadFile(filepath.Join(root, page))
		require.NoError(t, err)
		for _, name := range regexp.MustCompile(`holdfast_[a-z_]+`).FindAllString(string(b), -1) {
			require.Contains(t, code.String(), `"`+name+`"`, "%s names %s", page, name)
		}
	}
}

// TestEachLinkLeadsSomewhere: relative links of all pages.
func TestEachLinkLeadsSomewhere(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join(root, "*.md"))
	require.NoError(t, err)
	for _, dir := range []string{"docs", "docs/adr"} {
		more, err := filepath.Glob(filepath.Join(root, dir, "*.md"))
		require.NoError(t, err)
		pages = append(pages, more...)
	}
	require.Greater(t, len(pages), 8)
	for _, page := range pages {
		b, err := os.ReadFile(page)
		require.NoError(t, err)
		for _, link := range regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`).FindAllStringSubmatch(string(b), -1) {
			_, err := os.Stat(filepath.Join(filepath.Dir(page), link[1]))
			require.NoError(t, err, "%s links to %s", page, link[1])
		}
	}
}
