package replayer

import (
	"fmt"

	"github.com/holdfast-io/holdfast/pkg/service"
)

// Settings of the replayer: what it shares with the other binaries. Its flags
// are settings too, under [service.ReplayName].
type Settings struct {
	service.Common
	service.NATS
	service.Ledger
	service.Upstream
	UpstreamURL service.URL      `split_words:"true" secret:"true" shown:"required by run without HOLDFAST_ROUTES_FILE or --upstream" desc:"the API of the default route: http or https, and a host"`
	KeepAnswers service.ByteSize `split_words:"true" default:"0" min:"0" max:"512KiB" desc:"how many bytes of the body of each answer are kept, of the default route"`
	RoutesFile  string           `split_words:"true" desc:"the file of routes: each request is sent to the API of its route; it replaces HOLDFAST_UPSTREAM_URL"`
}

// problemsOf gives a line for each thing that is wrong with the settings.
func problemsOf(err error) []string {
	if err == nil {
		return nil
	}
	wrong, ok := err.(*service.SettingsError)
	if !ok {
		return []string{err.Error()}
	}
	lines := make([]string, len(wrong.Problems))
	for i, p := range wrong.Problems {
		lines[i] = fmt.Sprintf("%s: %s", p.Name, p.Reason)
	}
	return lines
}
