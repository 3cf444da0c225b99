package replayer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

const verifyHelp = `Reconcile, by id, what ingresses say they answered, their spools, both streams and
the ledger, and name every gap. It reads only, acknowledges nothing, makes no durable
consumer, and may run beside a system in use: what is under way is waited for, and
counted as in flight if it does not arrive.

It holds when everything that one of them names is received, failed, rejected,
quarantined, discarded, processed, in flight, set aside or expired, every
acknowledged outcome and event is in the ledger, every payload is whole, and every
count is what it says.

What it reads, beside the ledger and the retained window of both streams:
  spools       --spool-dir, or HOLDFAST_SPOOL_DIR (by default that of the data
               directory) if it is there. It takes the right to read the files.
  access logs  --answered: JSON lines of an ingress with HOLDFAST_ACCESS_LOG=all,
               plain or in gzip.
HOLDFAST_RETENTION, as the recorder has it, says what may have expired.

What it cannot see:
  - without access logs, the ids of what a spool lost before it was published. That
    something was lost shows as "captured", by the counts that ingresses send.
  - what was lost in the last quarter of a second before an ingress was killed, by
    these counts.
  - ids in a spool that it cannot read: they are undecided while that ingress is away.
  - facts of which the stream was trimmed, and those that only the row of a request
    still tells of where the ledger lost them; payloads that have the right length and
    other bytes.
  - in a ledger that is being written, whether its counts are exact.
  - whether the API has done what its answer or event said.

Exit codes: 0 it holds; 1 could not run, or could not decide because an ingress is
away; 2 bad usage or settings; 3 there are gaps; 130, 143 interrupted.`

func (a *app) verifyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "verify [flags]", Short: "Check that nothing is lost: reconcile answers, spools, streams and ledger", Long: verifyHelp}
	names := map[string]string{
		"since":          "look at ids made at or after `T`: RFC 3339, or a duration back from now; counts are of everything",
		"until":          "look at ids made before `T`",
		"fence-timeout":  "wait for at most `D` until what is under way has reached the ledger",
		"ignore-ingress": "the ingress with this `ID` is gone for good, and its spool; may be repeated",
	}
	for _, info := range slices.Concat(filterFlags(), sendFlags()) {
		if meaning, ok := names[info.name]; ok {
			info.meaning = meaning
			addFlags(cmd, info)
		}
	}
	addFlags(cmd, outputFlag)
	// On the command line alone: which files there are is said anew each time.
	spools := cmd.Flags().StringArray("spool-dir", nil, "read the spool in this `directory`, which may be in use; may be repeated (default: HOLDFAST_SPOOL_DIR if it is there)")
	answered := cmd.Flags().StringArray("answered", nil, "read this access log `file` of an ingress; may be repeated")
	a.does(cmd, func(v *values, args []string) func(context.Context) error {
		none(v, args)
		var s Selection
		s.Filter.Since, s.SinceAgo = v.moment("since")
		s.Filter.Until, s.UntilAgo = v.moment("until")
		o := VerifyOptions{Spools: *spools, Answered: *answered, Timeout: v.duration("fence-timeout"), Clock: SystemClock{}}
		o.Ignore, _ = v.list("ignore-ingress")
		o.Retention = v.retention()
		output := v.output()
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			now, err := store.Now(ctx)
			if err != nil {
				return err
			}
			f := s.Resolve(now)
			o.Since, o.Until = f.Since, f.Until
			o.Ledger, o.Logger = store, a.logger
			if len(o.Spools) == 0 {
				o.Spools = a.ownSpool()
			}
			conn, err := stream.Connect(stream.ConnectOptions{
				URL: a.settings.NatsURL.Raw(), CredsFile: a.settings.NatsCredsFile, CAFile: a.settings.NatsCAFile,
				Name: "replayer", Logger: a.logger,
			})
			if err != nil {
				return err
			}
			defer conn.Close()
			if o.JS, err = jetstream.New(conn); err != nil {
				return fmt.Errorf("use jetstream: %w", err)
			}
			out, err := Verify(ctx, o)
			if err != nil {
				return err
			}
			a.code = out.ExitCode
			return a.print(output, &out, out.WriteText)
		})
	})
	return cmd
}

// retention is the recorder's.
func (v *values) retention() time.Duration {
	const name, usual = "HOLDFAST_RETENTION", 720 * time.Hour
	text := v.getenv(name)
	if text == "" {
		return usual
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		v.wrong(name, text, "is not a duration; write for instance 720h")
	}
	return d
}

// ownSpool gives the spool of this data directory, if there is one.
func (a *app) ownSpool() []string {
	dir := environment("HOLDFAST_SPOOL_DIR")
	if dir == "" {
		dir = a.settings.Path("spool")
	}
	if _, err := os.Stat(dir); err != nil {
		return nil
	}
	return []string{dir}
}

// gapsShown bounds what people are shown; JSON has more.
const gapsShown = 100

// WriteText writes the verification for people.
func (v *Verification) WriteText(w io.Writer) error {
	var b bytes.Buffer
	verdict := "holds: everything is accounted for"
	switch v.ExitCode {
	case ExitReplayable:
		verdict = "DOES NOT HOLD: there are gaps"
	case ExitFailed:
		verdict = "not decided: what is missing may be in a spool that could not be read"
	}
	fmt.Fprintf(&b, "verify     %s (%s)\n", verdict, time.Duration(v.Seconds*float64(time.Second)).Round(time.Millisecond))
	for _, name := range slices.Sorted(maps.Keys(v.Streams)) {
		s := v.Streams[name]
		fmt.Fprintf(&b, "read       %s from %d to %d, acknowledged to %d\n", name, s.First, s.Last, s.Floor)
	}
	fmt.Fprintf(&b, "           %d payloads\n", v.Payloads)
	for _, wait := range v.Waits {
		fmt.Fprintf(&b, "waits for  %s\n", wait)
	}
	b.WriteString("\n")
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "\tseen\t")
	for _, state := range capture.States() {
		fmt.Fprintf(t, "%s\t", state)
	}
	fmt.Fprintln(t, "in flight\tset aside\texpired\tmissing\tundecided\t")
	for _, r := range v.Rows {
		fmt.Fprintf(t, "%s\t%d\t", r.Source, r.Seen)
		for _, state := range capture.States() {
			fmt.Fprintf(t, "%d\t", r.States[state])
		}
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t%d\t\n", r.InFlight, r.SetAside, r.Expired, r.Missing, r.Undecided)
	}
	all, aside := int64(0), int64(0)
	for _, n := range v.Ledger.Requests {
		all += n
	}
	for _, n := range v.Ledger.SetAside {
		aside += n
	}
	fmt.Fprintf(t, "ledger\t%d\t", all)
	for _, state := range capture.States() {
		fmt.Fprintf(t, "%d\t", v.Ledger.Requests[state])
	}
	fmt.Fprintf(t, "\t%d\t%d\t\t\t\n", aside, v.Ledger.Expired)
	if err := t.Flush(); err != nil {
		return err
	}
	if len(v.Gaps) > 0 {
		b.WriteString("\ngaps\n")
		for i := range v.Gaps[:min(len(v.Gaps), gapsShown)] {
			g := &v.Gaps[i]
			line := string(g.Kind)
			if g.ID != nil {
				line += "  " + g.ID.String()
			}
			if len(g.SeenIn) > 0 {
				line += "  seen in " + strings.Join(g.SeenIn, ", ")
			}
			fmt.Fprintf(&b, "  %s  %s\n", line, printable(g.Detail))
		}
		for _, kind := range slices.Sorted(maps.Keys(v.Counts)) {
			fmt.Fprintf(&b, "  %d of kind %s\n", v.Counts[kind], kind)
		}
	}
	if len(v.NotSeen) > 0 {
		b.WriteString("\nnot seen\n")
		for _, text := range v.NotSeen {
			fmt.Fprintf(&b, "  %s\n", text)
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}
