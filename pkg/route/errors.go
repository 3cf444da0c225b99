package route

import (
	"fmt"
	"strings"
)

// Problem is one thing that is wrong with a routes file.
type Problem struct {
	// Line begins at 1. It is 0 where the file as a whole is at fault.
	Line int
	// What says what is wrong and what is allowed. It never holds the URL of an
	// upstream, which may hold a password.
	What string
}

// FileError is everything that is wrong with a routes file, in the order of its
// lines. It is never empty; past 100 problems the rest is not looked for.
type FileError struct {
	Path     string
	Problems []Problem
}

// Error gives a line for each problem.
func (e *FileError) Error() string { return strings.Join(e.Lines(), "\n") }

// Lines gives each problem as "path:line: what", or "path: what".
func (e *FileError) Lines() []string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		if p.Line == 0 {
			lines[i] = fmt.Sprintf("%s: %s", e.Path, p.What)
		} else {
			lines[i] = fmt.Sprintf("%s:%d: %s", e.Path, p.Line, p.What)
		}
	}
	return lines
}
