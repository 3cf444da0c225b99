package main

import (
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
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
