// Command exampleapi runs the example API: see package exampleapi. When it
// listens it prints one line of JSON on standard output:
//
//	{"addr":"127.0.0.1:9000","url":"http://127.0.0.1:9000","db":"…","arrivals":"…"}
//
// Each flag is also an environment variable, -fail-file EXAMPLE_FAIL_FILE; the
// flag wins.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
)

func main() { os.Exit(run()) }

func run() int {
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	opts := exampleapi.Options{Die: die, Logger: logger}
	if err := parse(&opts, os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2 // the flag package has said why
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	api, err := exampleapi.New(opts)
	if err != nil {
		logger.Error("example API cannot start", "err", err)
		return 1
	}
	line := map[string]string{"addr": api.Addr(), "url": api.URL(), "db": opts.DB, "arrivals": exampleapi.ArrivalsFile(opts.DB)}
	if err := json.NewEncoder(os.Stdout).Encode(line); err != nil {
		logger.Error("standard output is closed", "err", err)
	}
	if err := api.Run(ctx); err != nil {
		logger.Error("example API ended", "err", err)
		return 1
	}
	return 0
}

func parse(opts *exampleapi.Options, args []string) error {
	flags := flag.NewFlagSet("exampleapi", flag.ContinueOnError)
	flags.StringVar(&opts.Addr, "addr", "127.0.0.1:9000", "`address` to listen on")
	flags.StringVar(&opts.DB, "db", "example.db", "`path` of the SQLite database; PATH.arrivals lies beside it")
	flags.StringVar(&opts.Report, "report", "", "base `URL` of the acker to report to (default: none)")
	flags.StringVar(&opts.TokenFile, "token-file", "", "`path` of the acker's bearer token")
	flags.Int64Var(&opts.MaxBody, "max-body", 64<<20, "greatest body in `bytes`")
	flags.BoolVar(&opts.DiscardBodies, "discard-bodies", false, "store length and hash of bodies only")
	flags.Float64Var(&opts.FailRate, "fail-rate", 0, "`share` of requests that fail, from 0 to 1")
	flags.StringVar(&opts.FailFile, "fail-file", "", "while this `file` exists all requests fail")
	flags.IntVar(&opts.FailStatus, "fail-status", 500, "`status` of failed requests")
	flags.DurationVar(&opts.Delay, "delay", 0, "`time` to wait before a request is acted upon")
	flags.BoolVar(&opts.CrashOnHeader, "crash-on-header", true, "die on a request with "+exampleapi.HeaderKill+": 1")
	flags.StringVar(&opts.CrashBody, "crash-body", "", "die on a request whose body contains this `text`")
	flags.StringVar(&opts.CrashAfterCommit, "crash-after-commit", "",
		"make this `file` and die between the next commit and its answer, unless the file exists")

	var envErr error
	flags.VisitAll(func(f *flag.Flag) {
		name := "EXAMPLE_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		f.Usage += "; also " + name
		if value, ok := os.LookupEnv(name); ok && envErr == nil {
			if err := flags.Set(f.Name, value); err != nil {
				envErr = fmt.Errorf("%s: %w", name, err)
			}
		}
	})
	if envErr != nil {
		fmt.Fprintln(flags.Output(), envErr)
		return envErr
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		err := fmt.Errorf("unknown arguments: %q", flags.Args())
		fmt.Fprintln(flags.Output(), err)
		return err
	}
	return nil
}

// die ends the process as kill -9 does. 137 is what a shell makes of that; it
// is used where the kernel refuses the signal, as for the first process of a
// container.
func die() {
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Kill()
	}
	os.Exit(137)
}
