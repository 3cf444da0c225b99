package service

import (
	"context"
	"io"
	"log"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/term"
)

// NewLogger makes the logger of a process. The format is json or text, or empty
// for text on a terminal and json elsewhere; the level is one of debug, info,
// warn and error. Other values, which Load refuses, give json and info. Lines
// carry no service: use Process.LoggerFor, or With("service", name).
func NewLogger(w io.Writer, level, format string) *slog.Logger {
	var least slog.Level
	if err := least.UnmarshalText([]byte(level)); err != nil {
		least = slog.LevelInfo
	}
	options := &slog.HandlerOptions{Level: least}
	if format == "" {
		if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			format = "text"
		}
	}
	if format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// ErrorLog adapts a logger for http.Server.ErrorLog and its like: each line
// becomes one warning, with the constant message and the line as err.
func ErrorLog(logger *slog.Logger, message string) *log.Logger {
	return log.New(lineWriter{logger, message}, "", 0)
}

type lineWriter struct {
	logger  *slog.Logger
	message string
}

func (w lineWriter) Write(line []byte) (int, error) {
	w.logger.LogAttrs(context.Background(), slog.LevelWarn, w.message, slog.String("err", strings.TrimSpace(string(line))))
	return len(line), nil
}
