package replayer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// RunView is a run as JSON.
type RunView struct {
	ID         string           `json:"id"`
	State      ledger.RunState  `json:"state"`
	Filter     ledger.Filter    `json:"filter"`
	Target     string           `json:"target,omitempty"`
	MaxSeq     int64            `json:"max_seq"`
	CreatedAt  time.Time        `json:"created_at"`
	UpdatedAt  time.Time        `json:"updated_at"`
	EndedAt    time.Time        `json:"ended_at,omitzero"`
	Owner      string           `json:"owner,omitempty"`
	LeaseUntil time.Time        `json:"lease_until,omitzero"`
	Counts     ledger.RunCounts `json:"counts"`
	Report     json.RawMessage  `json:"report,omitempty"`
}

func viewOf(r ledger.Run) RunView {
	v := RunView{
		ID: r.ID, State: r.State, Filter: r.Filter, Target: r.Target, MaxSeq: r.MaxSeq,
		CreatedAt: r.CreatedAt, UpdatedAt: r.UpdatedAt, EndedAt: r.EndedAt, Counts: r.Counts,
	}
	if r.State == ledger.RunActive {
		v.Owner, v.LeaseUntil = r.Owner, r.LeaseUntil
	}
	if json.Valid(r.Report) {
		v.Report = r.Report
	}
	return v
}

func (v *RunView) writeText(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "run        %s (%s)\n", v.ID, v.State)
	fmt.Fprintf(&b, "selection  %s\n", describe(v.Filter))
	if v.Target != "" {
		fmt.Fprintf(&b, "target     %s\n", v.Target)
	}
	fmt.Fprintf(&b, "created    %s\n", stamp(v.CreatedAt))
	if !v.EndedAt.IsZero() {
		fmt.Fprintf(&b, "ended      %s\n", stamp(v.EndedAt))
	}
	if v.Owner != "" {
		fmt.Fprintf(&b, "owner      %s, until %s\n", v.Owner, stamp(v.LeaseUntil))
	}
	c := v.Counts
	fmt.Fprintf(&b, "sent       %d: processed %d, failed %d, rejected %d, no verdict yet %d, skipped %d\n",
		c.Sent, c.Processed, c.Failed, c.Rejected, c.Unknown, c.Skipped)
	if len(v.Report) > 0 {
		b.WriteString("report\n")
		if err := json.Indent(&b, v.Report, "", "  "); err != nil {
			return err
		}
		b.WriteString("\n")
	}
	_, err := w.Write(b.Bytes())
	return err
}

func (a *app) runsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "runs", Short: "List, show and cancel replay runs"}
	a.does(cmd, func(v *values, args []string) func(context.Context) error {
		v.problems = append(v.problems, "runs needs one of list, show, cancel")
		return nil
	})

	list := &cobra.Command{Use: "list [flags]", Short: "List all runs"}
	addFlags(list, outputFlag)
	a.does(list, func(v *values, args []string) func(context.Context) error {
		none(v, args)
		output := v.output()
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			runs := []RunView{}
			for cursor := ""; ; {
				page, next, err := store.Runs(ctx, cursor, 1000)
				if err != nil {
					return err
				}
				for _, r := range page {
					view := viewOf(r)
					view.Report = nil // runs show has it
					runs = append(runs, view)
				}
				if cursor = next; cursor == "" {
					break
				}
			}
			return a.print(output, map[string]any{"runs": runs}, func(w io.Writer) error {
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "ID\tSTATE\tCREATED\tSENT\tPROCESSED\tFAILED\tREJECTED\tSELECTION\tTARGET")
				for _, r := range runs {
					fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%d\t%d\t%s\t%s\n", r.ID, r.State, stamp(r.CreatedAt),
						r.Counts.Sent, r.Counts.Processed, r.Counts.Failed, r.Counts.Rejected, describe(r.Filter), r.Target)
				}
				return t.Flush()
			})
		})
	})

	show := &cobra.Command{Use: "show ID [flags]", Short: "Show one run with its report"}
	addFlags(show, outputFlag)
	a.does(show, func(v *values, args []string) func(context.Context) error {
		id := v.runID(args)
		output := v.output()
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			r, err := store.Run(ctx, id)
			if err != nil {
				return fmt.Errorf("run %s: %w", id, err)
			}
			view := viewOf(r)
			return a.print(output, &view, view.writeText)
		})
	})

	cancel := &cobra.Command{Use: "cancel ID", Short: "End a run; what it did not send stays replayable"}
	a.does(cancel, func(v *values, args []string) func(context.Context) error {
		id := v.runID(args)
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			switch err := store.CancelRun(ctx, id); {
			case errors.Is(err, ledger.ErrConflict):
				return fmt.Errorf("run %s has ended already: %w", id, err)
			case err != nil:
				return fmt.Errorf("run %s: %w", id, err)
			}
			_, err := fmt.Fprintf(a.Stdout, "cancelled %s\n", id)
			return err
		})
	})
	cmd.AddCommand(list, show, cancel)
	return cmd
}

// runID reads the one argument that a command takes.
func (v *values) runID(args []string) string {
	if len(args) != 1 {
		v.problems = append(v.problems, "the ID of one run is needed; replayer runs list shows them")
		return ""
	}
	if _, err := uuid.Parse(args[0]); err != nil {
		v.problems = append(v.problems, fmt.Sprintf("%q is not the ID of a run; replayer runs list shows them", args[0]))
	}
	return args[0]
}

// withLedger gives work that needs the ledger alone.
func (a *app) withLedger(work func(context.Context, ledger.Store) error) func(context.Context) error {
	return func(ctx context.Context) error {
		store, err := a.open(ctx)
		if err != nil {
			return err
		}
		defer func() { _ = store.Close() }()
		return work(ctx, store)
	}
}

// discardBatch bounds one transaction of a discard, so that captures are not
// held up by it.
const discardBatch = 500

// discard gives up what the filter selects, at most limit, 0 for all.
func discard(ctx context.Context, store ledger.Operator, f ledger.Filter, reason string, limit int) (int, error) {
	total := 0
	for {
		most := discardBatch
		if limit > 0 {
			most = min(most, limit-total)
		}
		if most == 0 {
			return total, nil
		}
		n, err := store.Discard(ctx, f, reason, most)
		total += n
		if err != nil {
			return total, fmt.Errorf("discard, after %d: %w", total, err)
		}
		if n == 0 {
			return total, nil
		}
	}
}

func (a *app) discardCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "discard [filters] --reason TEXT", Short: "Give up requests that are not processed: they are not sent again"}
	infos := filterFlags()
	for i := range infos {
		if infos[i].name == "state" {
			infos[i].shown = "every state but processed"
		}
	}
	addFlags(cmd, append(infos, reasonFlag, outputFlag)...)
	// On the command line alone: an environment should not be able to give up
	// everything.
	all := cmd.Flags().Bool("all", false, "discard everything that is not processed; needed where there is no filter")
	a.does(cmd, func(v *values, args []string) func(context.Context) error {
		none(v, args)
		s, given := v.filter(discardable)
		limit := v.whole("limit", 1, maxLimit)
		reason := v.reason()
		output := v.output()
		switch {
		case !given && !*all:
			v.problems = append(v.problems, "discard needs a filter, or --all to give up everything that is not processed")
		case given && *all:
			v.problems = append(v.problems, "--all: does not go with filters")
		}
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			now, err := store.Now(ctx)
			if err != nil {
				return err
			}
			f := s.Resolve(now)
			if !f.Replayable && len(f.States) == 0 {
				f.States = discardable
			}
			n, err := discard(ctx, store, f, reason, limit)
			if err != nil {
				return err
			}
			return a.print(output, map[string]int{"discarded": n}, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "discarded %d\n", n)
				return err
			})
		})
	})
	return cmd
}

// QuarantineView is a quarantined request as JSON.
type QuarantineView struct {
	ID         uuid.UUID `json:"id"`
	ReceivedAt time.Time `json:"received_at"`
	Route      string    `json:"route"`
	Method     string    `json:"method"`
	Target     string    `json:"target"` // what is not printable ASCII is percent-encoded
	Attempts   int       `json:"attempts"`
	Reason     string    `json:"reason"`
	Detail     string    `json:"detail,omitempty"`
	Since      time.Time `json:"since"`
}

// quarantineShown bounds what quarantine list shows without --limit.
const quarantineShown = 100

func (a *app) quarantineCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "quarantine", Short: "List, release and discard requests that are held back"}
	a.does(cmd, func(v *values, args []string) func(context.Context) error {
		v.problems = append(v.problems, "quarantine needs one of list, release, discard")
		return nil
	})

	list := &cobra.Command{Use: "list [flags]", Short: "List what is held back, and why"}
	for _, i := range filterFlags() {
		if i.name == "limit" {
			i.shown = fmt.Sprint(quarantineShown)
			addFlags(list, i, outputFlag)
		}
	}
	a.does(list, func(v *values, args []string) func(context.Context) error {
		none(v, args)
		limit := v.whole("limit", 1, maxLimit)
		if limit == 0 {
			limit = quarantineShown
		}
		output := v.output()
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			held, more, err := quarantined(ctx, store, limit)
			if err != nil {
				return err
			}
			return a.print(output, map[string]any{"quarantined": held, "more": more}, func(w io.Writer) error {
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "ID\tRECEIVED\tMETHOD\tTARGET\tATTEMPTS\tSINCE\tREASON\tDETAIL")
				for _, q := range held {
					fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", q.ID, stamp(q.ReceivedAt), q.Method, q.Target,
						q.Attempts, stamp(q.Since), q.Reason, printable(q.Detail))
				}
				if more {
					fmt.Fprintln(t, "there are more: see --limit")
				}
				return t.Flush()
			})
		})
	})

	release := &cobra.Command{Use: "release ID…", Short: "Let requests be sent again"}
	a.does(release, func(v *values, args []string) func(context.Context) error {
		ids := v.requestIDs(args)
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			for _, id := range ids {
				switch err := store.ReleaseQuarantine(ctx, id); {
				case errors.Is(err, ledger.ErrConflict):
					return fmt.Errorf("request %s is not quarantined: %w", id, err)
				case err != nil:
					return fmt.Errorf("request %s: %w", id, err)
				}
				if _, err := fmt.Fprintf(a.Stdout, "released %s\n", id); err != nil {
					return err
				}
			}
			return nil
		})
	})

	giveUp := &cobra.Command{Use: "discard ID… --reason TEXT", Short: "Give up requests that are held back"}
	addFlags(giveUp, reasonFlag)
	a.does(giveUp, func(v *values, args []string) func(context.Context) error {
		ids := v.requestIDs(args)
		reason := v.reason()
		return a.withLedger(func(ctx context.Context, store ledger.Store) error {
			for _, id := range ids {
				f := ledger.Filter{IDs: []uuid.UUID{id}, States: []capture.State{capture.StateQuarantined}}
				n, err := store.Discard(ctx, f, reason, 1)
				if err != nil {
					return fmt.Errorf("discard %s: %w", id, err)
				}
				if n == 0 {
					return fmt.Errorf("request %s is not quarantined", id)
				}
				if _, err := fmt.Fprintf(a.Stdout, "discarded %s\n", id); err != nil {
					return err
				}
			}
			return nil
		})
	})
	cmd.AddCommand(list, release, giveUp)
	return cmd
}

// requestIDs reads the arguments of a command that takes requests.
func (v *values) requestIDs(args []string) []uuid.UUID {
	if len(args) == 0 {
		v.problems = append(v.problems, "the UUID of a request is needed, or several; replayer quarantine list shows them")
	}
	return v.uuids(args, "ID")
}

// quarantined gives the first requests that are held back, and whether there are
// more.
func quarantined(ctx context.Context, store ledger.Reader, limit int) ([]QuarantineView, bool, error) {
	held := []QuarantineView{}
	cursor := ""
	for {
		page, err := store.List(ctx, ledger.Filter{States: []capture.State{capture.StateQuarantined}}, cursor, 1000)
		if err != nil {
			return nil, false, fmt.Errorf("list quarantined: %w", err)
		}
		for _, q := range page.Requests {
			if len(held) == limit {
				return held, true, nil
			}
			detail, err := store.Get(ctx, q.ID)
			if errors.Is(err, ledger.ErrNotFound) {
				continue
			}
			if err != nil {
				return nil, false, fmt.Errorf("read %s: %w", q.ID, err)
			}
			view := QuarantineView{
				ID: q.ID, ReceivedAt: q.ReceivedAt, Route: q.Route, Method: printable(q.Method), Target: printable(q.Target), Attempts: q.Attempts,
			}
			for _, k := range detail.Facts.Quarantines {
				if k.ReleasedAt.IsZero() {
					view.Reason, view.Detail, view.Since = k.Reason, k.Detail, k.At
				}
			}
			held = append(held, view)
		}
		if cursor = page.Next; cursor == "" {
			return held, false, nil
		}
	}
}
