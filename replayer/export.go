package replayer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/service"
	formats "github.com/holdfast-io/holdfast/replayer/exchange"
)

// ExitIncomplete is the exit code of an export that is written, and has requests
// marked in it or left out of it.
const ExitIncomplete = 3

const exportHelp = `export writes captured requests as other tools read them, and changes nothing.

  har     HTTP archive 1.2, for browsers, proxies and import
  curl    a script for a POSIX shell, a command for each request; bodies that are long or not plain text are files
          in the directory FILE.bodies beside it, or stand in the script when that goes to stdout
  vegeta  a JSON target a line, for vegeta attack -format=json
  raw     HTTP/1.1 messages, a file for each request in the directory that --out names, which is made

Without --state, --status or --id it takes what run would send. The values of Authorization and Cookie fields are
replaced by [redacted] unless --secrets is given: exports travel. Secrets in targets, bodies and other fields are
not recognised, so an export is for its owner's eyes all the same. Each request has its X-Request-UUID.

A request whose payload has expired or is cut is marked in a HAR, left out elsewhere, and named on stderr, as is what a
tool cannot send as it was captured.

Exit codes: 0 all are written whole; 1 could not be written, and what was begun is removed; 2 bad usage or settings;
3 some are marked or left out; 130, 143 interrupted.`

// exportStates are those that may be exported: all.
var exportStates = capture.States()

func (a *app) exportCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "export [filters] --format har|curl|vegeta|raw [--out FILE]", Short: "Write requests as HAR, curl commands, vegeta targets or HTTP messages", Long: exportHelp}
	infos := filterFlags()
	for _, i := range sendFlags() {
		if i.name == "upstream" {
			i.meaning = "put the `URL` of another system before the targets"
			infos = append(infos, i)
		}
	}
	addFlags(cmd, infos...)
	// On the command line alone: they are about one file.
	format := cmd.Flags().String("format", "", "`FORMAT`: har, curl, vegeta or raw (required)")
	out := cmd.Flags().String("out", "-", "write to `FILE`, which must not be there; - is stdout")
	secrets := cmd.Flags().Bool("secrets", false, "keep the values of Authorization and Cookie")
	a.does(cmd, func(v *values, args []string) func(context.Context) error {
		none(v, args)
		s, _ := v.filter(exportStates)
		limit := v.whole("limit", 1, maxLimit)
		upstream := v.upstream()
		switch {
		case !slices.Contains([]string{"har", "curl", "vegeta", "raw"}, *format):
			v.wrong("--format", *format, "is not allowed; allowed are har, curl, vegeta and raw")
		case *format == "raw" && *out == "-":
			v.problems = append(v.problems, "--out: raw needs a directory: each request is a file of its own")
		case *format != "raw" && *format != "har" && upstream == nil &&
			environment("HOLDFAST_UPSTREAM_URL") == "" && environment("HOLDFAST_ROUTES_FILE") == "":
			v.problems = append(v.problems, "HOLDFAST_UPSTREAM_URL: is required; set it to the API, or set HOLDFAST_ROUTES_FILE, or give --upstream")
		}
		if *out == "" {
			v.problems = append(v.problems, "--out: is empty; name a file, or - for stdout")
		}
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			now, err := store.Now(ctx)
			if err != nil {
				return err
			}
			o := formats.ExportOptions{
				Source: store, Filter: toSend(s.Filter), Limit: limit, Secrets: *secrets,
				Base: a.base(upstream), OwnHost: upstream != nil && !a.settings.PreserveHost,
			}
			o.Filter = Selection{Filter: o.Filter, SinceAgo: s.SinceAgo, UntilAgo: s.UntilAgo}.Resolve(now)
			return a.export(ctx, o, *format, *out)
		})
	})
	return cmd
}

// base gives what stands before the targets of a route's requests.
func (a *app) base(upstream *url.URL) func(string) string {
	of := func(u *url.URL) string { return u.Scheme + "://" + u.Host } // never a password
	return func(name string) string {
		switch {
		case upstream != nil:
			return of(upstream)
		case a.table != nil:
			if r := a.table.ByName(name); r != nil {
				return of(r.Upstream)
			}
		case name == capture.DefaultRoute && a.settings.UpstreamURL.Host != "":
			return of(&a.settings.UpstreamURL.URL)
		}
		return ""
	}
}

// remarksShown is how many requests are named on stderr; all are counted.
const remarksShown = 100

func (a *app) export(ctx context.Context, o formats.ExportOptions, format, out string) (err error) {
	remarks := 0
	o.Remark = func(id uuid.UUID, r formats.Result) {
		if remarks++; remarks > remarksShown {
			return
		}
		what := "is marked"
		if r.Kind == formats.LeftOut {
			what = "is left out"
		}
		fmt.Fprintf(a.Stderr, "replayer: %s %s: %s\n", id, what, r.Reason)
	}
	var summary formats.Summary
	err = a.writeTo(format, out, func(w formats.Writer) error {
		o.Writer = w
		summary, err = formats.Export(ctx, o)
		return err
	})
	if err != nil {
		return err
	}
	if more := remarks - remarksShown; more > 0 {
		fmt.Fprintf(a.Stderr, "replayer: and %d more\n", more)
	}
	fmt.Fprintf(a.Stderr, "exported %d requests: whole %d, marked %d, left out %d", summary.Requests, summary.Whole, summary.Marked, summary.LeftOut)
	if summary.Redacted > 0 {
		fmt.Fprintf(a.Stderr, "; Authorization or Cookie replaced in %d (--secrets keeps them)", summary.Redacted)
	}
	fmt.Fprintln(a.Stderr)
	if summary.Whole != summary.Requests {
		a.code = ExitIncomplete
	}
	return nil
}

// writeTo makes the output and its writer. What was begun is removed with an
// error.
func (a *app) writeTo(format, out string, export func(formats.Writer) error) (err error) {
	if out == "-" {
		return write(format, a.Stdout, "", export)
	}
	made := []string{out}
	defer func() {
		for i := 0; err != nil && i < len(made); i++ {
			err = errors.Join(err, os.RemoveAll(made[i]))
		}
	}()
	if format == "raw" {
		if err := os.Mkdir(out, 0o700); err != nil {
			made = nil
			return err
		}
		return export(formats.NewRaw(out))
	}
	bodies := out + ".bodies"
	if _, err := os.Lstat(bodies); err == nil && format == "curl" {
		made = nil
		return fmt.Errorf("%s is there already: remove it, or name another file", bodies)
	}
	f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		made = nil
		return err
	}
	if format == "curl" {
		made = append(made, bodies)
	}
	return errors.Join(write(format, f, bodies, export), f.Close())
}

func write(format string, to io.Writer, bodies string, export func(formats.Writer) error) (err error) {
	var w formats.Writer
	switch format {
	case "har":
		w, err = formats.NewHAR(to, service.Version())
	case "curl":
		w, err = formats.NewCurl(to, bodies)
	default:
		w = formats.NewVegeta(to)
	}
	if err != nil {
		return err
	}
	return export(w)
}
