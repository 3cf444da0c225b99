package replayer

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/service"
	formats "github.com/holdfast-io/holdfast/replayer/exchange"
)

const importHelp = `import records the requests of files as captured ones, so that plan and run see them. It sends nothing.

  har  HTTP archive 1.2
  gor  goreplay's file (--output-file)

Files may be gzip. Each request is received at its own time, belongs to the route that takes it, or to --route, and has
the policy of that route: HOLDFAST_ROUTES_FILE, or HOLDFAST_COMPLETION, _UPSTREAM_TIMEOUT, _GRACE and _ORDER_BY as the
ingress has them. Where the API's answer decides, run may send it at once; where a completion event does, when the
route's grace is over. Methods count for nothing: a GET in the file is imported, whatever the route captures.

Framing is made anew; what ends at a hop, and our own fields, are dropped; [redacted] values of an export are dropped and
counted. An item whose body is cut or missing is refused with its number in the file, the others are taken.

The same file again makes no second request, as long as the ledger keeps the first: ids are made of content and time.
An entry of an export of ours that nobody has changed keeps its id.

Exit codes: 0 all are in the ledger; 1 some were refused, or a file or the ledger could not be used; 2 bad usage or
settings; 130, 143 interrupted: import again, what is there already stays one.`

// importSettings are what only import needs: what the ingress has decided about
// requests.
type importSettings struct {
	service.Common
	service.Routes
	MaxBodyBytes service.ByteSize `split_words:"true" default:"32MiB" min:"1" desc:"larger bodies are refused"`
}

func (a *app) importCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "import --format har|gor FILE… [--route R]", Short: "Record the requests of a HAR file or of goreplay as captured ones", Long: importHelp}
	addFlags(cmd, flagInfo{name: "route", shown: "the one that takes it", meaning: "make all of them requests of this `route`"})
	format := cmd.Flags().String("format", "", "`FORMAT`: har or gor (required)")
	a.does(cmd, func(v *values, files []string) func(context.Context) error {
		if *format != "har" && *format != "gor" {
			v.wrong("--format", *format, "is not allowed; allowed are har and gor")
		}
		if len(files) == 0 {
			v.problems = append(v.problems, "a FILE is needed, or several")
		}
		name, label := v.text("route")
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			var s importSettings
			if err := service.Load(&s, false); err != nil {
				return &usageError{problems: problemsOf(err)}
			}
			table, err := route.Load(s.Routes, int64(s.MaxBodyBytes))
			if err != nil {
				return &usageError{problems: problemsOf(err)}
			}
			find := table.Match
			if name != "" {
				one := table.ByName(name)
				if one == nil {
					return &usageError{problems: []string{fmt.Sprintf("%s: there is no route %s", label, printable(name))}}
				}
				find = func(string, string, string) *route.Route { return one }
			}
			return a.importAll(ctx, store, find, *format, files)
		})
	})
	return cmd
}

// errRefused: some items of a file were not taken. Each was named.
var errRefused = errors.New("some requests were not imported")

func (a *app) importAll(ctx context.Context, store ledger.Store, find func(host, target, method string) *route.Route, format string, files []string) error {
	now, err := store.Now(ctx)
	if err != nil {
		return err
	}
	var total formats.Imported
	var failed []error
	for _, path := range files {
		o := formats.ImportOptions{Ledger: store, Route: find, Now: now, Refused: func(number int, reason string) {
			fmt.Fprintf(a.Stderr, "replayer: %s: item %d: %s\n", printable(path), number, printable(reason))
		}}
		done, err := importFile(ctx, o, format, path)
		total.New += done.New
		total.Known += done.Known
		total.Refused += done.Refused
		total.Redacted += done.Redacted
		if err != nil {
			failed = append(failed, fmt.Errorf("import %s: %w", path, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	_, err = fmt.Fprintf(a.Stdout, "imported %d, known already %d, refused %d, without a redacted value %d\n", total.New, total.Known, total.Refused, total.Redacted)
	if total.Refused > 0 {
		failed = append(failed, errRefused)
	}
	return errors.Join(append(failed, err)...)
}

// maxItem bounds an item of a file: far above every body that a gateway takes.
const maxItem = 1 << 30

func importFile(ctx context.Context, o formats.ImportOptions, format, path string) (formats.Imported, error) {
	f, err := os.Open(path)
	if err != nil {
		return formats.Imported{}, err
	}
	defer func() { _ = f.Close() }() // nothing was written
	r, err := formats.Plain(f)
	if err != nil {
		return formats.Imported{}, err
	}
	if format == "har" {
		o.Reader = formats.NewHARReader(r)
	} else {
		o.Reader = formats.NewGorReader(r, maxItem)
	}
	return formats.Import(ctx, o)
}
