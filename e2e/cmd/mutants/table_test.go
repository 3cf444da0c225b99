package main

import (
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The table fits the code: each mutation finds its place, and makes what can at
// least be parsed.
func TestTableFitsTheCode(t *testing.T) {
	names := map[string]bool{}
	for _, m := range mutants {
		require.False(t, names[m.name], "two mutants are called %s", m.name)
		names[m.name] = true
		text, err := os.ReadFile(filepath.Join("..", "..", "..", m.file))
		require.NoError(t, err, m.name)
		mutated, err := m.apply(string(text))
		require.NoError(t, err)
		_, err = parser.ParseFile(token.NewFileSet(), m.file, mutated, parser.SkipObjectResolution)
		require.NoError(t, err, m.name)
	}
}

// Every test that the page of guarantees names is there.
func TestGuaranteesNameRealTests(t *testing.T) {
	root := filepath.Join("..", "..", "..")
	page, err := os.ReadFile(filepath.Join(root, "docs", "guarantees.md"))
	require.NoError(t, err)
	named := regexp.MustCompile("\\[`(\\S+) (Test\\w+)(?:/([^`]+))?`\\]").FindAllStringSubmatch(string(page), -1)
	require.Greater(t, len(named), 50)
	for _, n := range named {
		files, err := filepath.Glob(filepath.Join(root, n[1], "*_test.go"))
		require.NoError(t, err)
		if n[3] != "" { // the suite that the package runs
			suite, err := filepath.Glob(filepath.Join(root, filepath.Dir(n[1]), "*test", "*.go"))
			require.NoError(t, err)
			files = append(files, suite...)
		}
		text := ""
		for _, f := range files {
			b, err := os.ReadFile(f)
			require.NoError(t, err)
			text += string(b)
		}
		require.Contains(t, text, "func "+n[2]+"(", "%s", n[0])
		require.Contains(t, text, n[3], "%s", n[0])
	}
	require.Equal(t, strings.Count(string(page), " Test"), len(named), "a test is named in another form")
}
