package service

import (
	"errors"
	"fmt"
	"strings"
)

// ErrEnded says that a component's Run returned nil although nobody had asked
// it to stop.
var ErrEnded = errors.New("ended although nobody stopped it")

// ErrNotStopped says that a component or a clean-up was still busy when its
// time was up. It has been left behind, and the process should exit.
var ErrNotStopped = errors.New("did not stop in time")

// ErrNoToken says that a token file holds no token, or more than one word.
var ErrNoToken = errors.New("the file holds no single token")

// SettingError is what is wrong with one setting.
type SettingError struct {
	// Name is the full name of the setting, for instance HOLDFAST_LOG_LEVEL.
	Name string
	// Reason says what is wrong and what is allowed. It never holds a secret.
	Reason string
}

func (e SettingError) Error() string { return e.Name + ": " + e.Reason }

// SettingsError is everything that is wrong with the settings of a process, in
// the order of the settings, unknown names last. It is never empty.
type SettingsError struct {
	Problems []SettingError
}

func (e *SettingsError) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "; ")
}

// Invalid makes a SettingError. The name is given without the prefix HOLDFAST_.
func Invalid(name, format string, args ...any) SettingError {
	return SettingError{Name: prefix + "_" + name, Reason: fmt.Sprintf(format, args...)}
}

// ComponentError names the component that failed.
type ComponentError struct {
	Component string
	Err       error
}

func (e *ComponentError) Error() string { return e.Component + ": " + e.Err.Error() }

// Unwrap gives the error of the component itself.
func (e *ComponentError) Unwrap() error { return e.Err }
