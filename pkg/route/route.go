package route

import (
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
)

// Mode says what happens to a request that cannot be stored.
type Mode string

const (
	// Required refuses it.
	Required Mode = "required"
	// BestEffort passes it on all the same.
	BestEffort Mode = "best_effort"
	// Off stores none.
	Off Mode = "off"
)

// Route is what is decided about the requests that match it. Routes are made by
// [Load]; nobody changes them afterwards, so that they may be used by many
// goroutines at once.
type Route struct {
	Name string
	// Hosts are in lower case and have a port only where the file gives one; one
	// that begins with "*." stands for every name with more labels on the left.
	// Empty means every host.
	Hosts []string
	Path  Path
	// Methods are those that the route takes; nil means every method.
	Methods service.Methods
	// Upstream is the API: scheme and host, nothing else.
	Upstream *url.URL
	Mode     Mode
	// Captured are the methods that are captured unless Mode is [Off]; see
	// [Route.Captures].
	Captured service.Methods
	MaxBody  int64 // bytes
	// KeepAnswers is how many bytes of the body of an answer to a captured request
	// are kept, at most [capture.MaxAnswer]; 0 keeps none.
	KeepAnswers int
	Policy      capture.Policy
	// Accept answers 202 for a request that is stored when the API fails. It goes
	// with [Required] alone.
	Accept bool
	// OrderBy is the canonical name of the header that holds the ordering key;
	// empty means none.
	OrderBy string
	// SetHeaders are set in replays, and only there.
	SetHeaders []SetHeader
	// Health is the path, with a query where it has one, that the API answers GET
	// with 2xx while it is well; empty where none is known. Replays ask for it.
	Health string
}

// Path is a condition on the path of a request; at most one field is set, and
// the zero value means every path. Both are normalised. A prefix matches by
// element: /v1/calls matches /v1/calls and /v1/calls/7, not /v1/callsx.
type Path struct {
	Exact, Prefix string
}

// SetHeader is a header field of replayed requests whose value is in a file.
type SetHeader struct {
	// Name is a token, spelled as in the routes file.
	Name string
	// File is the path of the file with the value. A relative one has been taken
	// from the directory of the routes file. It is not read here.
	File string
}

// Captures reports whether requests with this method are captured.
func (r *Route) Captures(method string) bool {
	return r.Mode != Off && r.Captured.Has(method)
}

// takes reports whether the route takes requests with this method.
func (r *Route) takes(method string) bool { return len(r.Methods) == 0 || r.Methods.Has(method) }

// Load gives the routes of the settings: those of the file, or the default
// route. maxBody, in bytes, is the default of max_body, which a route may set
// lower or higher. The error is a [*FileError] about the file, or a
// [*service.SettingsError] about the settings of the default route.
func Load(s service.Routes, maxBody int64) (*Table, error) {
	if s.RoutesFile != "" {
		return loadFile(s.RoutesFile, maxBody)
	}
	if problems := checkDefault(s); len(problems) > 0 {
		return nil, &service.SettingsError{Problems: problems}
	}
	policy := capture.DefaultPolicy()
	policy.By = capture.CompletionBy(s.Completion)
	policy.Timeout, policy.Grace = s.UpstreamTimeout, s.Grace
	return newTable([]*Route{{
		Name:        capture.DefaultRoute,
		Upstream:    &url.URL{Scheme: s.UpstreamURL.Scheme, Host: s.UpstreamURL.Host},
		Mode:        Mode(s.Capture),
		Captured:    s.CaptureMethods,
		MaxBody:     maxBody,
		KeepAnswers: int(s.KeepAnswers),
		Policy:      policy,
		Accept:      s.OnFailure == "accept",
		OrderBy:     http.CanonicalHeaderKey(strings.TrimPrefix(s.OrderBy, "header:")),
	}}), nil
}

// Check gives what is wrong with the routes of the settings, for the Validate of
// a service: a problem for each line of the file, under HOLDFAST_ROUTES_FILE, or
// those of the default route under their own names. maxBody is that of [Load].
func Check(s service.Routes, maxBody int64) []service.SettingError {
	_, err := Load(s, maxBody)
	if wrong, ok := errors.AsType[*service.SettingsError](err); ok {
		return wrong.Problems
	}
	var problems []service.SettingError
	if wrong, ok := errors.AsType[*FileError](err); ok {
		for _, line := range wrong.Lines() {
			problems = append(problems, service.Invalid("ROUTES_FILE", "%s", line))
		}
	}
	return problems
}

func checkDefault(s service.Routes) []service.SettingError {
	problems := s.Validate()
	if p := s.UpstreamURL.Path; p != "" && p != "/" {
		problems = append(problems, service.Invalid("UPSTREAM_URL", "the path %s is not allowed; requests keep the path that the client sent", p))
	}
	return problems
}
