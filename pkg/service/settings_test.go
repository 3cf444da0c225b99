package service

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// loadFrom loads as from an environment that holds these variables alone, named
// without the prefix.
func loadFrom(s Settings, local bool, env map[string]string) error {
	full := map[string]string{}
	var environ []string
	for name, value := range env {
		full[prefix+"_"+name] = value
		environ = append(environ, prefix+"_"+name+"="+value)
	}
	return load(s, local, func(name string) string { return full[name] }, environ)
}

// problems gives what Load finds, by name without prefix.
func problems(t *testing.T, err error) map[string]string {
	t.Helper()
	if err == nil {
		return map[string]string{}
	}
	wrong, ok := err.(*SettingsError)
	require.True(t, ok, err)
	found := map[string]string{}
	for _, p := range wrong.Problems {
		name, ok := strings.CutPrefix(p.Name, prefix+"_")
		require.True(t, ok, p.Name)
		require.NotContains(t, found, name, "a setting is named once")
		found[name] = p.Reason
	}
	return found
}

// promised is every setting with its default, and standalone's where it differs.
// Others rely on these: a change here is a change for users.
var promised = []struct{ name, def, local string }{
	{name: "UPSTREAM_URL"},
	{"UPSTREAM_TIMEOUT", "30s", ""},
	{"COMPLETION", "response", ""},
	{"ON_FAILURE", "passthrough", ""},
	{"CAPTURE", "required", ""},
	{"CAPTURE_METHODS", "POST,PUT,PATCH,DELETE", ""},
	{"KEEP_ANSWERS", "0", ""},
	{name: "ORDER_BY"},
	{"GRACE", "1m", ""},
	{name: "ROUTES_FILE"},
	{"INGRESS_ADDR", ":8080", "127.0.0.1:8080"},
	{name: "TLS_CERT_FILE"},
	{name: "TLS_KEY_FILE"},
	{name: "UPSTREAM_CA_FILE"},
	{"PRESERVE_HOST", "true", ""},
	{name: "TRUSTED_PROXIES"},
	{"MAX_BODY_BYTES", "32MiB", ""},
	{"MAX_INFLIGHT_BYTES", "256MiB", ""},
	{"INLINE_BYTES", "256KiB", ""},
	{"RETRY_AFTER", "5s", ""},
	{"MAX_HEADER_BYTES", "64KiB", ""},
	{"MAX_HEADER_FIELDS", "128", ""},
	{"MAX_CONNECTIONS", "20000", ""},
	{"MAX_CONNECTIONS_PER_CLIENT", "0", ""},
	{"READ_HEADER_TIMEOUT", "10s", ""},
	{"READ_BODY_TIMEOUT", "30s", ""},
	{"WRITE_TIMEOUT", "30s", ""},
	{"IDLE_TIMEOUT", "90s", ""},
	{"DRAIN_DELAY", "5s", "0s"},
	{"INGRESS_ID", "<host name>", ""},
	{"STORE", "synced", ""},
	{"SPOOL_DIR", "<data dir>/spool", ""},
	{"SPOOL_MAX_BYTES", "4GiB", ""},
	{"SPOOL_SALVAGE", "false", ""},
	{"ACKER_ADDR", ":8081", "127.0.0.1:8081"},
	{"RECORDER_ADDR", ":8082", "127.0.0.1:8082"},
	{name: "API_TOKEN_FILE"},
	{name: "API_AUTH"},
	{"OPS_ADDR", ":9090", "127.0.0.1:9090"},
	{"NATS_URL", "nats://127.0.0.1:4222", ""},
	{name: "NATS_CREDS_FILE"},
	{name: "NATS_CA_FILE"},
	{"NATS_ADDR", "127.0.0.1:4222", ""},
	{"STREAM_REPLICAS", "1", ""},
	{"STREAM_MAX_BYTES", "10GiB", ""},
	{"LEDGER_URL", "sqlite://<data dir>/ledger.db", ""},
	{"DATA_DIR", "./data", ""},
	{"KEEP_PROCESSED", "24h", ""},
	{"KEEP_PROCESSED_BYTES", "10GiB", ""},
	{"RETENTION", "720h", ""},
	{"LOG_LEVEL", "info", ""},
	{"LOG_FORMAT", "json, text on a terminal", ""},
	{"ACCESS_LOG", "errors", ""},
	{"SHUTDOWN_TIMEOUT", "25s", ""},
}

func TestHelpListsEverySetting(t *testing.T) {
	for _, local := range []bool{false, true} {
		var help bytes.Buffer
		require.NoError(t, WriteSettings(&help, &catalogue{}, local))
		for _, p := range promised {
			def := p.def
			if local && p.local != "" {
				def = p.local
			}
			shown := "default: " + def
			switch {
			case p.name == "UPSTREAM_URL":
				shown = "default: required without HOLDFAST_ROUTES_FILE"
			case def == "":
				shown = "no default"
			}
			require.Contains(t, help.String(), fmt.Sprintf("  HOLDFAST_%s  (%s)\n        ", p.name, shown))
		}
	}
	described := Describe(&catalogue{}, false)
	require.Len(t, described, len(promised))
	for _, s := range described {
		require.NotEmpty(t, s.Meaning, s.Name)
	}
}

func TestDefaultsAreValid(t *testing.T) {
	for _, local := range []bool{false, true} {
		var s catalogue
		require.NoError(t, loadFrom(&s, local, map[string]string{"UPSTREAM_URL": "http://127.0.0.1:3000"}))
		require.Equal(t, 30*time.Second, s.UpstreamTimeout)
		require.Equal(t, ByteSize(32<<20), s.MaxBodyBytes)
		require.Equal(t, Methods{"POST", "PUT", "PATCH", "DELETE"}, s.CaptureMethods)
		require.Equal(t, 1, s.StreamReplicas)
		require.True(t, s.PreserveHost)
		require.Equal(t, "sqlite://./data/ledger.db", s.LedgerURL.Raw())
		require.Equal(t, "./data/spool", s.SpoolDir)
		require.Empty(t, s.LogFormat)
		host, err := os.Hostname()
		require.NoError(t, err)
		require.Equal(t, idOf(host), s.IngressID)
		require.Equal(t, local, s.IngressAddr.IsLoopback())
		require.Equal(t, local, s.OpsAddr.IsLoopback())
	}
}

func TestDefaultsIgnoreTheEnvironment(t *testing.T) {
	t.Setenv("HOLDFAST_LOG_LEVEL", "loud")
	t.Setenv("HOLDFAST_DATA_DIR", "/elsewhere")
	var s catalogue
	require.NoError(t, Defaults(&s, true))
	require.Equal(t, "info", s.LogLevel)
	require.Equal(t, "./data/spool", s.SpoolDir)
	require.Equal(t, Addr("127.0.0.1:8080"), s.IngressAddr)
}

func TestLoadReadsTheProcessEnvironment(t *testing.T) {
	t.Setenv("HOLDFAST_LOG_LEVEL", "warn")
	t.Setenv("HOLDFAST_OPS_ADDR", "")
	t.Setenv("LOG_FORMAT", "text") // a bare name is not ours
	var s struct{ Common }
	require.NoError(t, Load(&s, false))
	require.Equal(t, "warn", s.LogLevel)
	require.Equal(t, Addr(":9090"), s.OpsAddr)
	require.Empty(t, s.LogFormat)
	t.Setenv("HOLDFAST_LOG_LEVEL", "loud")
	require.ErrorContains(t, Load(&s, false), "HOLDFAST_LOG_LEVEL")
}

func TestDataDirMovesWhatIsInIt(t *testing.T) {
	var s catalogue
	require.NoError(t, loadFrom(&s, false, map[string]string{"UPSTREAM_URL": "http://api", "DATA_DIR": `my "data", 50% é`}))
	require.Equal(t, `sqlite://my "data", 50% é/ledger.db`, s.LedgerURL.Raw())
	require.Equal(t, s.LedgerURL.Raw(), s.LedgerURL.String())
	require.Equal(t, `my "data", 50% é/spool`, s.SpoolDir)
	require.Equal(t, `my "data", 50% é/x`, s.Path("x"))
}

func TestEveryProblemAtOnce(t *testing.T) {
	var s catalogue
	err := loadFrom(&s, false, map[string]string{
		"UPSTREAM_URL":         "ftp://files",
		"UPSTREAM_TIMEOUT":     "30",
		"COMPLETION":           "maybe",
		"CAPTURE_METHODS":      "POST,,PUT",
		"GRACE":                "-1s",
		"INGRESS_ADDR":         "8080",
		"PRESERVE_HOST":        "yes please",
		"TRUSTED_PROXIES":      "10.0.0.0/8,here",
		"MAX_BODY_BYTES":       "12 apples",
		"INLINE_BYTES":         "2MiB",
		"STREAM_REPLICAS":      "three",
		"RETENTION":            "1h",
		"INGRESS_ID":           "a.b",
		"LEDGER_URL":           "mysql://root:hush@db",
		"STREEM_MAX_BYTES":     "1GiB",
		"WHOLLY_UNLIKE_A_NAME": "1",
	})
	require.Equal(t, map[string]string{
		"UPSTREAM_URL":         "has a scheme that is not allowed; allowed are http and https",
		"UPSTREAM_TIMEOUT":     `"30" is not a duration; write for instance 30s, 5m or 24h`,
		"COMPLETION":           `"maybe" is not allowed; allowed are response and event`,
		"CAPTURE_METHODS":      `"POST,,PUT" is not a list of methods; write for instance POST,PUT or *`,
		"GRACE":                `"-1s" is too small; the least is 0s`,
		"INGRESS_ADDR":         `"8080" is not an address; write host:port or :port, for instance 127.0.0.1:8080`,
		"PRESERVE_HOST":        `"yes please" is not allowed; allowed are true and false`,
		"TRUSTED_PROXIES":      `"10.0.0.0/8,here" is not a list of addresses and networks; write for instance 10.0.0.0/8,192.168.1.7`,
		"MAX_BODY_BYTES":       `"12 apples" is not a size; write a number of bytes, or one with KiB, MiB or GiB, for instance 32MiB`,
		"INLINE_BYTES":         `"2MiB" is too large; the most is 768KiB`,
		"STREAM_REPLICAS":      `"three" is not a whole number`,
		"RETENTION":            `"1h" is too small; the least is 48h`,
		"INGRESS_ID":           `"a.b" is not allowed; write letters, digits, - and _, at most 64`,
		"LEDGER_URL":           "has a scheme that is not allowed; allowed are sqlite, postgres and postgresql",
		"STREEM_MAX_BYTES":     "is not the name of a setting; did you mean HOLDFAST_STREAM_MAX_BYTES?",
		"WHOLLY_UNLIKE_A_NAME": "is not the name of a setting",
	}, problems(t, err))
	require.Equal(t, 30*time.Second, s.UpstreamTimeout, "what could not be read keeps its default")
}

func TestEmptyCountsAsUnset(t *testing.T) {
	var s catalogue
	env := map[string]string{"NO_SUCH_NAME": ""}
	for _, p := range promised {
		env[p.name] = ""
	}
	require.Equal(t, map[string]string{
		"UPSTREAM_URL": "is required; set it to the API, for instance http://127.0.0.1:3000, or set HOLDFAST_ROUTES_FILE",
	}, problems(t, loadFrom(&s, false, env)))
	require.Equal(t, ByteSize(4<<30), s.SpoolMaxBytes)
}

func TestNamesOfOthersAreFine(t *testing.T) {
	var s struct{ Common }
	env := map[string]string{
		"UPSTREAM_URL": "anything", "KEEP_PROCESSED": "x", "NATS_ADDR": "y",
		// The replayer's flags.
		"REPLAY_MAX_ATTEMPTS": "3", "REPLAY_IGNORE_INGRESS": "a", "REPLAY_SINCE": "1h",
		// What Kubernetes injects for Services named holdfast and holdfast-….
		"PORT": "tcp://10.0.0.1:80", "PORT_80_TCP": "tcp://10.0.0.1:80", "SERVICE_HOST": "10.0.0.1",
		"INGRESS_PORT": "tcp://10.0.0.1:80", "INGRESS_PORT_80_TCP_ADDR": "10.0.0.1",
		"INGRESS_SERVICE_HOST": "10.0.0.1", "INGRESS_SERVICE_PORT_HTTP": "80",
	}
	require.NoError(t, loadFrom(&s, false, env))
	// What only looks a little like it is still a mistake.
	require.Equal(t, map[string]string{
		"SUPPORT":          "is not the name of a setting",
		"REPLAY_ATTEMPTS":  "is not the name of a setting; did you mean HOLDFAST_REPLAY_MAX_ATTEMPTS?",
		"INGRESS_SERVICES": "is not the name of a setting",
	}, problems(t, loadFrom(&s, false, map[string]string{"SUPPORT": "1", "REPLAY_ATTEMPTS": "3", "INGRESS_SERVICES": "x"})))
}

func TestReplayNames(t *testing.T) {
	known := knownNames()
	for _, name := range []string{
		"SINCE", "UNTIL", "STATE", "STATUS", "ROUTE", "METHOD", "PATH", "ID", "LIMIT", "RATE", "CONCURRENCY",
		"MAX_ATTEMPTS", "ORDER_BY", "PAST_BLOCKED", "UPSTREAM", "HEALTH_PATH", "WAIT", "PAUSE_LIMIT", "FENCE_TIMEOUT",
		"IGNORE_INGRESS", "OUTPUT", "REASON",
	} {
		require.True(t, known["HOLDFAST_REPLAY_"+name], name)
	}
	require.Equal(t, "HOLDFAST_REPLAY_MAX_ATTEMPTS", ReplayName("max-attempts"))
}

func TestWhatMustGoTogether(t *testing.T) {
	for name, c := range map[string]struct {
		env  map[string]string
		want string // the one setting at fault, none when empty
	}{
		"accept":                         {map[string]string{"ON_FAILURE": "accept"}, ""},
		"accept, best effort":            {map[string]string{"ON_FAILURE": "accept", "CAPTURE": "best_effort"}, "ON_FAILURE"},
		"accept, off":                    {map[string]string{"ON_FAILURE": "accept", "CAPTURE": "off"}, "ON_FAILURE"},
		"accept, best effort, by a file": {map[string]string{"ON_FAILURE": "accept", "CAPTURE": "off", "ROUTES_FILE": "r.yaml"}, ""},
		"order by header":                {map[string]string{"ORDER_BY": "header:X-Client-Id"}, ""},
		"order by nothing":               {map[string]string{"ORDER_BY": "header:"}, "ORDER_BY"},
		"order by path":                  {map[string]string{"ORDER_BY": "path"}, "ORDER_BY"},
		"certificate alone":              {map[string]string{"TLS_CERT_FILE": "c"}, "TLS_KEY_FILE"},
		"key alone":                      {map[string]string{"TLS_KEY_FILE": "k"}, "TLS_CERT_FILE"},
		"certificate and key":            {map[string]string{"TLS_CERT_FILE": "c", "TLS_KEY_FILE": "k"}, ""},
		"token and none":                 {map[string]string{"API_TOKEN_FILE": "t", "API_AUTH": "none"}, "API_AUTH"},
		"payloads outlive requests":      {map[string]string{"KEEP_PROCESSED": "721h"}, "KEEP_PROCESSED"},
		"a spool below one body":         {map[string]string{"SPOOL_MAX_BYTES": "32MiB"}, "SPOOL_MAX_BYTES"},
		// The address is wrong and keeps its default; nothing is said of the default.
		"no news about what is not read": {map[string]string{"SPOOL_MAX_BYTES": "huge", "MAX_BODY_BYTES": "5GiB"}, "SPOOL_MAX_BYTES"},
	} {
		t.Run(name, func(t *testing.T) {
			c.env["UPSTREAM_URL"] = "https://api.example.com/base"
			var s catalogue
			found := problems(t, loadFrom(&s, false, c.env))
			if c.want == "" {
				require.Empty(t, found)
				return
			}
			require.Len(t, found, 1)
			require.Contains(t, found, c.want)
		})
	}
}

func TestRequireAuth(t *testing.T) {
	for _, addr := range []Addr{"127.0.0.1:1", "[::1]:1", "localhost:1", "127.8.8.8:0"} {
		require.Empty(t, RequireAuth("ACKER_ADDR", addr, API{}), addr)
	}
	for _, addr := range []Addr{":1", "0.0.0.0:1", "[::]:1", "10.0.0.1:1", "acker:1"} {
		require.Len(t, RequireAuth("ACKER_ADDR", addr, API{}), 1, addr)
		require.Empty(t, RequireAuth("ACKER_ADDR", addr, API{APITokenFile: "f"}), addr)
		require.Empty(t, RequireAuth("ACKER_ADDR", addr, API{APIAuth: "none"}), addr)
	}
}

func TestASettingOutsideTheCatalogueIsAFault(t *testing.T) {
	var s struct {
		Common
		Colour string `split_words:"true"`
	}
	require.Contains(t, problems(t, loadFrom(&s, false, nil))["COLOUR"], "fault of the program")
}

func TestOneGroupsProblemsAreSaidOnce(t *testing.T) {
	// A struct with a single group that has Validate has it by promotion.
	var s struct {
		Common
		API
	}
	require.Len(t, problems(t, loadFrom(&s, false, map[string]string{"API_TOKEN_FILE": "t", "API_AUTH": "none"})), 1)
}

func TestSecretsAreNotShown(t *testing.T) {
	for name, value := range map[string]string{
		"LEDGER_URL":   "postgres://u:hush@db:port/x",
		"NATS_URL":     "nats://u:hush@a:4222,nats://u:hush@ b",
		"UPSTREAM_URL": "http://u:hush@api",
	} {
		var s catalogue
		err := loadFrom(&s, false, map[string]string{"UPSTREAM_URL": "http://api", name: value})
		require.ErrorContains(t, err, name)
		require.NotContains(t, err.Error(), "hush")
	}

	c := ConnURL("postgres://u:hush@db/x?password=hush&sslmode=off,nats://tok@b:4222")
	encoded, err := json.Marshal(struct{ C ConnURL }{c})
	require.NoError(t, err)
	var logs bytes.Buffer
	slog.New(slog.NewTextHandler(&logs, nil)).Info("m", "a", c)
	slog.New(slog.NewJSONHandler(&logs, nil)).Info("m", "a", c)
	for _, text := range []string{fmt.Sprint(c), fmt.Sprintf("%v %+v %#v %q %s", c, c, c, c, c), string(encoded), logs.String()} {
		require.NotContains(t, text, "hush")
		require.NotContains(t, text, "tok")
		require.Contains(t, text, "postgres://db/x,nats://b:4222")
	}
	require.Contains(t, c.Raw(), "hush")
}

func TestConnURLs(t *testing.T) {
	for text, shown := range map[string]string{
		"nats://a:4222, nats://u:p@b:4222":    "nats://a:4222,nats://b:4222",
		"postgres://u:p@h1:5432,h2:5433/db?x": "postgres://h1:5432,h2:5433/db",
		"postgres:///db?host=/run/pg":         "postgres:///db",
		"sqlite://a,b?c":                      "sqlite://a,b?c",
	} {
		var c ConnURL
		require.NoError(t, c.UnmarshalText([]byte(text)), text)
		require.Equal(t, text, c.Raw())
		require.Equal(t, shown, c.String())
	}
	for _, bad := range []string{"", "localhost:4222", "nats", "sqlite://", "nats://a,", "nats://a b"} {
		var c ConnURL
		require.Error(t, c.UnmarshalText([]byte(bad)), bad)
	}
}

func TestLongValuesAreClipped(t *testing.T) {
	var s struct{ Common }
	found := problems(t, loadFrom(&s, false, map[string]string{"LOG_LEVEL": strings.Repeat("é", 5000)}))
	require.Less(t, len(found["LOG_LEVEL"]), 250)
}

func TestURLs(t *testing.T) {
	for _, good := range []string{"http://api", "https://api.example.com:8443/base", "http://[::1]:80", "HTTP://api"} {
		var u URL
		require.NoError(t, u.UnmarshalText([]byte(good)), good)
		require.False(t, u.IsZero())
	}
	for _, bad := range []string{"api:8080", "//api", "http://", "http://:80", "http://u@api", "http://api?x=1", "http://api?", "http://api#x", "http://api#", "http://api:0", "http://api:99999", "http://a b", "unix:///x", "/x"} {
		var u URL
		require.Error(t, u.UnmarshalText([]byte(bad)), bad)
		require.True(t, u.IsZero())
	}
}

func TestAddrs(t *testing.T) {
	for _, good := range []string{":0", "127.0.0.1:8080", "[::1]:1", "api.example.com:65535"} {
		var a Addr
		require.NoError(t, a.UnmarshalText([]byte(good)), good)
	}
	for _, bad := range []string{"8080", "127.0.0.1", "::1:80", ":http", ":65536", ":-1", "http://a:1", "a b:1", ":"} {
		var a Addr
		require.Error(t, a.UnmarshalText([]byte(bad)), bad)
	}
}

func TestByteSizes(t *testing.T) {
	for text, want := range map[string]ByteSize{"0": 0, "1": 1, "32MiB": 32 << 20, "10 GiB": 10 << 30, "1.5KiB": 1536, "1kB": 1000, "8EiB": -1, "-1": -1, "1e3": -1, "": -1, "MiB": -1, "NaN": -1} {
		var b ByteSize
		if err := b.UnmarshalText([]byte(text)); want < 0 {
			require.Error(t, err, text)
		} else {
			require.NoError(t, err, text)
			require.Equal(t, want, b)
		}
	}
	require.Equal(t, "32MiB", ByteSize(32<<20).String())
	require.Equal(t, "1000", ByteSize(1000).String())
	rapid.Check(t, func(t *rapid.T) {
		want := ByteSize(rapid.Int64Min(0).Draw(t, "size"))
		text, err := want.MarshalText()
		require.NoError(t, err)
		var got ByteSize
		require.NoError(t, got.UnmarshalText(text))
		require.Equal(t, want, got, "a size reads as it was written")
	})
}

func TestMethodsAndPrefixes(t *testing.T) {
	var m Methods
	require.NoError(t, m.UnmarshalText([]byte("POST, PUT")))
	require.True(t, m.Has("PUT"))
	require.False(t, m.Has("GET"))
	require.NoError(t, m.UnmarshalText([]byte("*")))
	require.True(t, m.Has("GET"))

	var p Prefixes
	require.NoError(t, p.UnmarshalText([]byte("10.1.2.3/8, 192.168.1.7,fd00::/8")))
	for text, want := range map[string]bool{"10.9.9.9": true, "::ffff:10.9.9.9": true, "192.168.1.7": true, "192.168.1.8": false, "fd00::1": true, "fe80::1%eth0": false} {
		require.Equal(t, want, p.Contains(netip.MustParseAddr(text)), text)
	}
}

func TestIDOfAHost(t *testing.T) {
	require.Equal(t, "ip-10-0-0-1-eu-internal", idOf("ip-10-0-0-1.eu.internal"))
	require.Len(t, idOf(strings.Repeat("a", 300)), 64)
	require.True(t, isID(idOf("höst")))
}

func TestADrainLeavesTimeForTheRest(t *testing.T) {
	require.Empty(t, RequireStop(time.Second, 2*time.Second))
	for _, whole := range []time.Duration{time.Second, time.Millisecond} {
		problems := RequireStop(time.Second, whole)
		require.Len(t, problems, 1)
		require.Equal(t, "HOLDFAST_DRAIN_DELAY", problems[0].Name)
	}
}
