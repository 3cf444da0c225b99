package replayer

import (
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

type noProgress struct{}

func (noProgress) Update(Status) {}
func (noProgress) Close()        {}

// NewProgress gives a bar where w is a terminal, and log lines elsewhere.
func NewProgress(w io.Writer, logger *slog.Logger, clock Clock) Progress {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &bar{w: w}
	}
	return &lines{logger: logger, clock: clock, began: clock.Now(), last: clock.Now()}
}

// bar is for people who look on.
type bar struct {
	w   io.Writer
	bar *progressbar.ProgressBar
}

// barThrottle keeps a fast run from spending its time on a terminal.
const barThrottle = 100 * time.Millisecond

func (b *bar) Update(s Status) {
	if b.bar == nil {
		b.bar = progressbar.NewOptions64(max(s.Total, 1),
			progressbar.OptionSetWriter(b.w),
			progressbar.OptionSetDescription("replaying"),
			progressbar.OptionShowCount(),
			progressbar.OptionShowIts(),
			progressbar.OptionThrottle(barThrottle),
			progressbar.OptionFullWidth(),
		)
	}
	// What failed may be sent again, so that only the others count as done.
	done := s.Processed + s.Rejected + s.Unknown
	if done > b.bar.GetMax64() {
		b.bar.ChangeMax64(done)
	}
	_ = b.bar.Set64(done) // a terminal that cannot be written to is no reason to stop
}

func (b *bar) Close() {
	if b.bar != nil {
		_ = b.bar.Exit()
		_, _ = io.WriteString(b.w, "\n")
	}
}

// lines is for logs.
type lines struct {
	logger      *slog.Logger
	clock       Clock
	began, last time.Time
}

// lineEvery bounds how much a long run writes into a log.
const lineEvery = 5 * time.Second

func (l *lines) Update(s Status) {
	now := l.clock.Now()
	if now.Sub(l.last) < lineEvery {
		return
	}
	l.last = now
	l.logger.Info("replay goes on", "selected", s.Total, "sent", s.Sent, "processed", s.Processed,
		"failed", s.Failed, "rejected", s.Rejected, "unknown", s.Unknown, "seconds", int(now.Sub(l.began).Seconds()))
}

func (l *lines) Close() {}
