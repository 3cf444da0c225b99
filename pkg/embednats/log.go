package embednats

import (
	"fmt"
	"log/slog"
	"sync"
)

// logs hands nats-server's lines to slog, and remembers the fatal one: the
// server reports why it could not start in its log alone.
type logs struct {
	logger *slog.Logger

	mu    sync.Mutex
	fatal string
}

const logMessage = "nats-server"

// Noticef goes to debug: a start alone has some thirty lines.
func (l *logs) Noticef(format string, v ...any) {
	l.logger.Debug(logMessage, "detail", fmt.Sprintf(format, v...))
}

func (l *logs) Warnf(format string, v ...any) {
	l.logger.Warn(logMessage, "detail", fmt.Sprintf(format, v...))
}

func (l *logs) Errorf(format string, v ...any) {
	l.logger.Error(logMessage, "detail", fmt.Sprintf(format, v...))
}

// Fatalf does not end the process; the server returns from Start after it.
func (l *logs) Fatalf(format string, v ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fatal == "" {
		l.fatal = fmt.Sprintf(format, v...)
	}
}

func (l *logs) Debugf(string, ...any) {}
func (l *logs) Tracef(string, ...any) {}

func (l *logs) fatalLine() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fatal
}
