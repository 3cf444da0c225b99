package ledger

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// Selects reports whether the filter selects r, by r.Replayable and the other
// fields as they were read. It is what stores mean by a filter.
//
// matchStatus is the status of the last attempt that has one, 0 for none; it is
// r.Status unless the last attempt ended without an answer.
func (f *Filter) Selects(r *Request, matchStatus int) bool {
	switch {
	case len(f.States) > 0 && !slices.Contains(f.States, r.State),
		f.Replayable && !r.Replayable:
		return false
	}
	return f.selectsBesideState(r, matchStatus)
}

func (f *Filter) selectsBesideState(r *Request, matchStatus int) bool {
	switch {
	case len(f.Routes) > 0 && !slices.Contains(f.Routes, r.Route),
		len(f.Methods) > 0 && !slices.Contains(f.Methods, r.Method),
		f.Statuses != "" && !f.Statuses.Contains(matchStatus),
		!f.Since.IsZero() && r.ReceivedAt.Before(f.Since),
		!f.Until.IsZero() && !r.ReceivedAt.Before(f.Until),
		len(f.IDs) > 0 && !slices.Contains(f.IDs, r.ID):
		return false
	}
	return f.Path == "" || matchPath(f.Path, r.Target)
}

// Sendable reports whether a run with this filter may send r: see [Replayer].
// r.Replayable is as of now.
func (f *Filter) Sendable(r *Request, matchStatus int) bool {
	switch r.State {
	case capture.StateFailed, capture.StateReceived:
		if !r.Replayable {
			return false
		}
	case capture.StateRejected:
		if !slices.Contains(f.States, r.State) && (len(f.States) > 0 || f.Statuses == "" && len(f.IDs) == 0) {
			return false
		}
	case capture.StateQuarantined:
		if !slices.Contains(f.States, r.State) {
			return false
		}
	default:
		return false
	}
	return f.Selects(r, matchStatus)
}

// Testable reports whether a run with this filter may send r to another target:
// see [Replayer].
func (f *Filter) Testable(r *Request, matchStatus int) bool {
	if r.State == capture.StateProcessed {
		return slices.Contains(f.States, r.State) && !r.PayloadExpired && f.Selects(r, matchStatus)
	}
	return f.Sendable(r, matchStatus)
}

// Covers reports whether r belongs to what a run with this filter is about,
// whatever state it is in by now: everything but the states has to match. A
// status does not count either, since a replay changes it.
func (f *Filter) Covers(r *Request) bool {
	beside := *f
	beside.Statuses = ""
	return beside.selectsBesideState(r, 0)
}

// Canonical gives the filter as JSON, the same for filters that select the
// same by the same words in another order.
func (f *Filter) Canonical() (string, error) {
	c := *f
	c.States = sorted(c.States)
	c.Routes = sorted(c.Routes)
	c.Methods = sorted(c.Methods)
	c.IDs = slices.Clone(c.IDs)
	slices.SortFunc(c.IDs, func(a, b uuid.UUID) int { return strings.Compare(string(a[:]), string(b[:])) })
	c.IDs = slices.Compact(c.IDs)
	if !c.Since.IsZero() {
		c.Since = c.Since.UTC()
	}
	if !c.Until.IsZero() {
		c.Until = c.Until.UTC()
	}
	b, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encode filter: %w", err)
	}
	return string(b), nil
}

func sorted[T ~string](s []T) []T {
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}

// matchPath reports whether the glob stands for the target's path. It takes
// time proportional to the product of their lengths at worst.
func matchPath(glob, target string) bool {
	path, _, _ := strings.Cut(target, "?")
	// Where the last "**" and the last "*" stand, and how far into path they
	// reach: on a mismatch the nearest one takes a byte more.
	p, g := 0, 0
	star, starP := -1, 0     // glob index after "*"
	double, doubleP := -1, 0 // glob index after "**"
	for {
		switch {
		case g < len(glob) && strings.HasPrefix(glob[g:], "**"):
			g += 2
			double, doubleP = g, p
			star = -1
			continue
		case g < len(glob) && glob[g] == '*':
			g++
			star, starP = g, p
			continue
		case g < len(glob) && p < len(path) && (glob[g] == '?' && path[p] != '/' || glob[g] != '?' && glob[g] == path[p]):
			g++
			p++
			continue
		case g == len(glob) && p == len(path):
			return true
		}
		if star >= 0 && starP < len(path) && path[starP] != '/' {
			starP++
			g, p = star, starP
			continue
		}
		if double >= 0 && doubleP < len(path) {
			doubleP++
			g, p, star = double, doubleP, -1
			continue
		}
		return false
	}
}
