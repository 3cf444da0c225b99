// Command mutants breaks the code on purpose, in one way at a time, and sees a
// test catch each: a test that has never failed proves nothing.
//
// No source in the tree is touched: a mutant is built with go build's -overlay.
// What a failing property test writes under testdata/rapid is not kept by git.
// First the tests are run on the code as it is, and must pass; then each mutant
// is run with its test, which must fail. One that does not compile, or that no
// test catches, fails the command.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// testTimeout bounds one run of a test. A mutant may make a test wait for what
// never comes, which tests bound by less.
const testTimeout = 3 * time.Minute

func main() {
	only := flag.String("only", "", "run the mutants whose names match this `expression`")
	list := flag.Bool("list", false, "list the mutants and run nothing")
	verbose := flag.Bool("v", false, "show what the tests of each mutant print")
	root := flag.String("root", ".", "`directory` of go.work")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	r := runner{verbose: *verbose}
	err := r.run(ctx, *root, *only, *list)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		stop()
		os.Exit(1)
	}
}

type runner struct {
	root    string
	dir     string // of mutated files
	verbose bool
}

func (r *runner) run(ctx context.Context, root, only string, list bool) (err error) {
	wanted, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if r.root, err = filepath.Abs(root); err != nil {
		return fmt.Errorf("find the root: %w", err)
	}
	chosen := slices.DeleteFunc(slices.Clone(mutants), func(m mutant) bool { return !wanted.MatchString(m.name) })
	if len(chosen) == 0 {
		return errors.New("no mutant has such a name")
	}
	if list {
		w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		for _, m := range chosen {
			fmt.Fprintf(w, "%s\t%s\t%s %s\n", m.name, m.breaks, m.pkg, m.test)
		}
		return w.Flush()
	}
	if r.dir, err = os.MkdirTemp("", "holdfast-mutants-"); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.dir)) }()

	if err := r.baseline(ctx, chosen); err != nil {
		return err
	}
	var bad []string
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "MUTANT\tRESULT\tSECONDS\tBY\tBREAKS")
	for _, m := range chosen {
		began := time.Now()
		result, by := r.try(ctx, m)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if result != caught {
			bad = append(bad, m.name)
		}
		fmt.Fprintf(w, "%s\t%s\t%.1f\t%s\t%s\n", m.name, result, time.Since(began).Seconds(), by, m.breaks)
		fmt.Fprintf(os.Stderr, "%-40s %-16s %6.1fs %s\n", m.name, result, time.Since(began).Seconds(), by)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(bad) > 0 {
		return fmt.Errorf("%d of %d mutants were not caught: %s", len(bad), len(chosen), strings.Join(bad, ", "))
	}
	fmt.Printf("all %d mutants were caught\n", len(chosen))
	return nil
}

// baseline runs the tests on the code as it is.
func (r *runner) baseline(ctx context.Context, chosen []mutant) error {
	tests := map[string][]string{} // by package
	var order []string
	for _, m := range chosen {
		if _, err := r.mutate(m); err != nil {
			return err
		}
		if tests[m.pkg] == nil {
			order = append(order, m.pkg)
		}
		if !slices.Contains(tests[m.pkg], m.test) {
			tests[m.pkg] = append(tests[m.pkg], m.test)
		}
	}
	for _, pkg := range order {
		for _, test := range tests[pkg] {
			out, err := r.test(ctx, pkg, test, "")
			switch {
			case err != nil:
				return fmt.Errorf("%s %s fails without a mutant: %w\n%s", pkg, test, err, out)
			case bytes.Contains(out, []byte("no tests to run")):
				return fmt.Errorf("%s has no test %s", pkg, test)
			}
		}
		fmt.Fprintf(os.Stderr, "%-40s passes as it is\n", pkg)
	}
	return nil
}

// Results of a mutant.
const (
	caught        = "caught"
	survived      = "SURVIVED"
	doesNotBuild  = "DOES NOT BUILD"
	cannotBeTried = "CANNOT BE TRIED"
)

var failedTest = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`)

// try runs a mutant, and says which test caught it.
func (r *runner) try(ctx context.Context, m mutant) (result, by string) {
	overlay, err := r.overlay(m)
	if err != nil {
		return cannotBeTried, err.Error()
	}
	out, err := r.test(ctx, m.pkg, m.test, overlay)
	failed := failedTest.FindSubmatch(out)
	switch {
	case err == nil:
		result = survived
	case bytes.Contains(out, []byte("[build failed]")) || bytes.Contains(out, []byte("[setup failed]")):
		result = doesNotBuild
	case failed != nil:
		result, by = caught, string(failed[1])
	case bytes.Contains(out, []byte("panic: ")):
		result, by = caught, m.test+" (panic)"
	default:
		result = cannotBeTried
	}
	if r.verbose || result == doesNotBuild || result == cannotBeTried {
		fmt.Fprintf(os.Stderr, "%s:\n%s\n", m.name, out)
	}
	return result, by
}

// test runs one test, with an overlay if that is not empty.
func (r *runner) test(ctx context.Context, pkg, test, overlay string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-timeout", testTimeout.String(), "-run", "^"+strings.ReplaceAll(test, "/", "$/^")+"$", "./"+pkg)
	cmd.Dir = r.root
	cmd.Env = append(os.Environ(), "GOWORK="+filepath.Join(r.root, "go.work"))
	if overlay != "" {
		// By the environment, so that it reaches the builds of tests that build.
		cmd.Env = append(cmd.Env, strings.TrimSpace("GOFLAGS="+os.Getenv("GOFLAGS")+" -overlay="+overlay))
	}
	return cmd.CombinedOutput()
}

// mutate gives the mutated text of the mutant's file.
func (r *runner) mutate(m mutant) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(r.root, m.file))
	if err != nil {
		return nil, fmt.Errorf("read the file of %s: %w", m.name, err)
	}
	mutated, err := m.apply(string(text))
	return []byte(mutated), err
}

// overlay writes what go build's -overlay needs.
func (r *runner) overlay(m mutant) (string, error) {
	text, err := r.mutate(m)
	if err != nil {
		return "", err
	}
	file := filepath.Join(r.dir, m.name+".go")
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(r.root, m.file): file}})
	if err != nil {
		return "", fmt.Errorf("write overlay: %w", err)
	}
	name := filepath.Join(r.dir, m.name+".json")
	if err := errors.Join(os.WriteFile(file, text, 0o600), os.WriteFile(name, overlay, 0o600)); err != nil {
		return "", fmt.Errorf("write overlay: %w", err)
	}
	return name, nil
}
