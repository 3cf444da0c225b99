package service

import (
	"path/filepath"
	"strings"
	"time"
)

// This file is the one place where the settings of all binaries stand. A
// service's settings are a struct that embeds Common and the groups it needs,
// anonymously:
//
//	type Settings struct {
//		service.Common
//		service.NATS
//		service.Ledger
//	}
//
// The tags of a field:
//
//	split_words  makes envconfig take UPSTREAM_URL from UpstreamURL; always there
//	default      the value when the variable is unset or empty; <data dir> and
//	             <host name> stand for DATA_DIR and for the host's name
//	local        the default of a process that is all of Holdfast (standalone)
//	shown        what the help shows as the default, where a default is not plain
//	allowed      the only values there are, separated by commas
//	min, max     the bounds, inclusive, in the field's own notation
//	secret       "true" where the value may hold a password and is never shown
//	desc         the meaning

// Settings is implemented by a pointer to any struct that embeds Common.
type Settings interface {
	base() *Common
}

// Common is what every binary needs.
type Common struct {
	LogLevel        string        `split_words:"true" default:"info" allowed:"debug,info,warn,error" desc:"the least severe lines that are logged"`
	LogFormat       string        `split_words:"true" shown:"json, text on a terminal" allowed:"json,text" desc:"the form of log lines"`
	OpsAddr         Addr          `split_words:"true" default:":9090" local:"127.0.0.1:9090" desc:"where /livez, /readyz and /metrics are served, and /debug/pprof when this is a loopback address"`
	DataDir         string        `split_words:"true" default:"./data" desc:"the directory for everything the process keeps"`
	ShutdownTimeout time.Duration `split_words:"true" default:"25s" min:"1s" desc:"how long an ordered stop may take; keep it below Kubernetes' 30s"`
}

func (c *Common) base() *Common { return c }

// NATS says how to reach the broker: all binaries but standalone.
type NATS struct {
	NatsURL       ConnURL `split_words:"true" default:"nats://127.0.0.1:4222" schemes:"nats,tls,ws,wss" secret:"true" desc:"the broker; several addresses are separated by commas"`
	NatsCredsFile string  `split_words:"true" desc:"the file with the NATS user's credentials"`
	NatsCAFile    string  `split_words:"true" desc:"the file with the certificates that the broker's is checked against"`
}

// EmbeddedNATS says where standalone's own broker listens.
type EmbeddedNATS struct {
	NatsAddr Addr `split_words:"true" default:"127.0.0.1:4222" desc:"where the embedded nats-server of standalone listens"`
}

// Streams says how the streams are made: used where they are created, checked
// elsewhere.
type Streams struct {
	StreamReplicas int      `split_words:"true" default:"1" min:"1" max:"5" desc:"the replicas of each stream"`
	StreamMaxBytes ByteSize `split_words:"true" default:"10GiB" min:"1MiB" desc:"the most that each stream may hold"`
}

// Ledger says where the ledger is: recorder, acker, replayer, standalone.
type Ledger struct {
	LedgerURL ConnURL `split_words:"true" default:"sqlite://<data dir>/ledger.db" schemes:"sqlite,postgres,postgresql" secret:"true" desc:"the ledger: sqlite:// with a path; postgres:// is not supported yet"`
}

// API says who may use the APIs of acker and recorder.
type API struct {
	APITokenFile string `split_words:"true" desc:"the file with the bearer token that the APIs of acker and recorder ask for"`
	APIAuth      string `split_words:"true" allowed:"none" desc:"none says on purpose that these APIs need no token; this or HOLDFAST_API_TOKEN_FILE is required off loopback"`
}

// Validate refuses a token together with the word that there is none.
func (a API) Validate() []SettingError {
	if a.APITokenFile != "" && a.APIAuth == "none" {
		return []SettingError{Invalid("API_AUTH", "is none, but HOLDFAST_API_TOKEN_FILE is set too; set one of them")}
	}
	return nil
}

// RequireAuth refuses an API that listens on addr, off loopback, when api names
// neither a token nor says on purpose that there is none. The name is that of
// the address's setting without prefix, for instance ACKER_ADDR.
func RequireAuth(name string, addr Addr, api API) []SettingError {
	if addr.IsLoopback() || api.APITokenFile != "" || api.APIAuth == "none" {
		return nil
	}
	return []SettingError{Invalid(name, "%q is not a loopback address; set HOLDFAST_API_TOKEN_FILE, or HOLDFAST_API_AUTH=none to have no token on purpose", addr)}
}

// Routes is the default route, and the file that replaces it: ingress,
// standalone, and whoever else sends to the API.
type Routes struct {
	UpstreamURL     URL           `split_words:"true" secret:"true" shown:"required without HOLDFAST_ROUTES_FILE" desc:"the API: http or https, and a host"`
	UpstreamTimeout time.Duration `split_words:"true" default:"30s" min:"1ms" desc:"how long the whole answer of the API may take"`
	Completion      string        `split_words:"true" default:"response" allowed:"response,event" desc:"what makes a request processed: the API's answer, or only its completion event"`
	OnFailure       string        `split_words:"true" default:"passthrough" allowed:"passthrough,accept" desc:"what the client gets when the API fails: the failure, or 202 with the request's UUID once it is stored"`
	Capture         string        `split_words:"true" default:"required" allowed:"required,best_effort,off" desc:"whether a request that cannot be stored is refused, passed on all the same, or none is stored"`
	CaptureMethods  Methods       `split_words:"true" default:"POST,PUT,PATCH,DELETE" desc:"the methods that are captured, * for all; others are proxied uncaptured"`
	KeepAnswers     ByteSize      `split_words:"true" default:"0" min:"0" max:"512KiB" desc:"how many bytes of the body of the API's answer are kept with each captured request, for test replays to compare with; 0 keeps none"`
	OrderBy         string        `split_words:"true" desc:"header:NAME stores the value of that header with each request as its ordering key; replays send those of one key one at a time, in their order"`
	Grace           time.Duration `split_words:"true" default:"1m" min:"0s" desc:"how long past its timeout a request without verdict stays untouched"`
	RoutesFile      string        `split_words:"true" desc:"the file of routes, as docs/integration.md says; it replaces HOLDFAST_UPSTREAM_URL, _UPSTREAM_TIMEOUT, _COMPLETION, _ON_FAILURE, _CAPTURE, _CAPTURE_METHODS, _KEEP_ANSWERS, _ORDER_BY and _GRACE"`
}

// Validate checks the default route, unless a routes file replaces it.
func (r Routes) Validate() []SettingError {
	if r.RoutesFile != "" {
		return nil
	}
	var problems []SettingError
	if r.UpstreamURL.IsZero() {
		problems = append(problems, Invalid("UPSTREAM_URL", "is required; set it to the API, for instance http://127.0.0.1:3000, or set HOLDFAST_ROUTES_FILE"))
	}
	if r.OnFailure == "accept" && r.Capture != "required" {
		problems = append(problems, Invalid("ON_FAILURE", "accept needs HOLDFAST_CAPTURE=required, because only a stored request can be accepted; it is %s", r.Capture))
	}
	if r.OrderBy != "" {
		name, ok := strings.CutPrefix(r.OrderBy, "header:")
		if !ok || !isToken(name) {
			problems = append(problems, Invalid("ORDER_BY", "%q is not allowed; write header: and the name of a header, for instance header:X-Client-Id", r.OrderBy))
		}
	}
	return problems
}

// Upstream says how the API is spoken to, whatever the route.
type Upstream struct {
	UpstreamCAFile string `split_words:"true" desc:"the file with the certificates that the API's is checked against"`
	PreserveHost   bool   `split_words:"true" default:"true" desc:"whether the API sees the client's Host header rather than its own host"`
}

// Ingress is what only the ingress needs, and standalone.
type Ingress struct {
	IngressAddr             Addr          `split_words:"true" default:":8080" local:"127.0.0.1:8080" desc:"where clients are served"`
	TLSCertFile             string        `split_words:"true" desc:"the certificate of the ingress; with the key, HTTPS and HTTP/2"`
	TLSKeyFile              string        `split_words:"true" desc:"the key of the ingress's certificate"`
	TrustedProxies          Prefixes      `split_words:"true" desc:"addresses and networks whose X-Forwarded-* headers are kept, separated by commas"`
	MaxBodyBytes            ByteSize      `split_words:"true" default:"32MiB" min:"1" desc:"larger bodies are answered 413"`
	MaxInflightBytes        ByteSize      `split_words:"true" default:"256MiB" min:"1MiB" desc:"above this much in flight, requests are answered 503"`
	InlineBytes             ByteSize      `split_words:"true" default:"256KiB" min:"1KiB" max:"768KiB" desc:"bodies up to this travel in one message, larger ones in chunks; a message must fit the broker's max_payload of 1MiB with its head"`
	RetryAfter              time.Duration `split_words:"true" default:"5s" min:"1s" desc:"what a 503 tells the client to wait"`
	MaxHeaderBytes          ByteSize      `split_words:"true" default:"64KiB" min:"1KiB" max:"128KiB" desc:"larger heads are answered 431"`
	MaxHeaderFields         int           `split_words:"true" default:"128" min:"1" max:"1000" desc:"heads with more fields are answered 431"`
	MaxConnections          int           `split_words:"true" default:"20000" min:"1" desc:"above this many connections of clients, further ones are answered 503 and closed"`
	MaxConnectionsPerClient int           `split_words:"true" default:"0" min:"0" desc:"the same for one client's address, but for HOLDFAST_TRUSTED_PROXIES; 0 is no limit"`
	ReadHeaderTimeout       time.Duration `split_words:"true" default:"10s" min:"1ms" desc:"how long a client may take for the head of a request"`
	ReadBodyTimeout         time.Duration `split_words:"true" default:"30s" min:"1ms" desc:"how long a client may pause in a body; beyond that time 1 KiB/s are asked of it too"`
	WriteTimeout            time.Duration `split_words:"true" default:"30s" min:"1ms" desc:"how long a client may take to read a part of an answer"`
	IdleTimeout             time.Duration `split_words:"true" default:"90s" min:"1ms" desc:"how long a connection of a client may be idle"`
	DrainDelay              time.Duration `split_words:"true" default:"5s" local:"0s" min:"0s" desc:"how long a stop goes on to take connections after it is not ready, for balancers to notice; part of HOLDFAST_SHUTDOWN_TIMEOUT"`
	IngressID               string        `split_words:"true" default:"<host name>" desc:"names the spool, and must stay the same over restarts: letters, digits, - and _, at most 64"`
	Store                   string        `split_words:"true" default:"synced" allowed:"synced,replicated" desc:"what a request must be before its answer: fsynced here, or acknowledged by a replicated stream (not supported yet)"`
	SpoolDir                string        `split_words:"true" default:"<data dir>/spool" desc:"the directory of the spool"`
	SpoolMaxBytes           ByteSize      `split_words:"true" default:"4GiB" min:"1MiB" desc:"the most that the spool may take on disk"`
	SpoolSalvage            bool          `split_words:"true" default:"false" desc:"publish what is readable of a damaged spool, once; the damaged files are kept"`
	AccessLog               string        `split_words:"true" default:"errors" allowed:"errors,all,off" desc:"which requests are logged"`
}

// Validate checks what must go together.
func (i Ingress) Validate() []SettingError {
	var problems []SettingError
	switch {
	case i.TLSCertFile != "" && i.TLSKeyFile == "":
		problems = append(problems, Invalid("TLS_KEY_FILE", "is required with HOLDFAST_TLS_CERT_FILE"))
	case i.TLSCertFile == "" && i.TLSKeyFile != "":
		problems = append(problems, Invalid("TLS_CERT_FILE", "is required with HOLDFAST_TLS_KEY_FILE"))
	}
	if !isID(i.IngressID) {
		problems = append(problems, Invalid("INGRESS_ID", "%q is not allowed; write letters, digits, - and _, at most 64", i.IngressID))
	}
	if i.SpoolMaxBytes <= i.MaxBodyBytes {
		problems = append(problems, Invalid("SPOOL_MAX_BYTES", "%s cannot hold one body of HOLDFAST_MAX_BODY_BYTES (%s); make it larger", i.SpoolMaxBytes, i.MaxBodyBytes))
	}
	return problems
}

// RequireStop refuses a drain that leaves no time for the rest of the stop.
func RequireStop(drain, whole time.Duration) []SettingError {
	if drain < whole {
		return nil
	}
	return []SettingError{Invalid("DRAIN_DELAY", "%s leaves nothing of HOLDFAST_SHUTDOWN_TIMEOUT (%s) for requests under way", drain, whole)}
}

// Acker is what only the acker needs, and standalone.
type Acker struct {
	AckerAddr Addr `split_words:"true" default:":8081" local:"127.0.0.1:8081" desc:"where completions are taken over HTTP"`
}

// Recorder is what only the recorder needs, and standalone.
type Recorder struct {
	RecorderAddr       Addr          `split_words:"true" default:":8082" local:"127.0.0.1:8082" desc:"where the read API is served"`
	KeepProcessed      time.Duration `split_words:"true" default:"24h" min:"0s" desc:"how long the payload of a processed request is kept"`
	KeepProcessedBytes ByteSize      `split_words:"true" default:"10GiB" min:"0" desc:"the most that payloads of processed requests may take; the oldest go first"`
	Retention          time.Duration `split_words:"true" default:"720h" min:"48h" desc:"how long everything closed is kept; what is open never expires"`
}

// Validate refuses to keep payloads longer than their requests.
func (r Recorder) Validate() []SettingError {
	if r.KeepProcessed > r.Retention {
		return []SettingError{Invalid("KEEP_PROCESSED", "%s is longer than HOLDFAST_RETENTION (%s)", r.KeepProcessed, r.Retention)}
	}
	return nil
}

// catalogue is every setting there is but those of the replayer's flags. A
// name that is not in it is unknown to all binaries.
type catalogue struct {
	Common
	NATS
	EmbeddedNATS
	Streams
	Ledger
	API
	Routes
	Upstream
	Ingress
	Acker
	Recorder
}

// replayFlags are the flags of the replayer, each of which is also a setting.
// The replayer owns their meanings and defaults; the names stand here so that
// the other binaries know them.
func replayFlags() []string {
	return []string{
		"since", "until", "state", "status", "route", "method", "path", "id", "limit",
		"rate", "concurrency", "max-attempts", "order-by", "past-blocked", "upstream",
		"health-path", "wait", "pause-limit", "fence-timeout", "ignore-ingress", "output", "reason",
		"speed", "max-gap", "again", "ignore",
	}
}

// ReplayName gives the setting that stands for a flag of the replayer, for
// instance HOLDFAST_REPLAY_MAX_ATTEMPTS for max-attempts.
func ReplayName(flag string) string {
	return prefix + "_REPLAY_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// Path gives the path of a name inside the data directory.
func (c *Common) Path(name string) string { return filepath.Join(c.DataDir, name) }

// isID says whether an ingress may have this name: it becomes a token of NATS
// subjects and the name of a directory.
func isID(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if !isAlnum(c) && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// isToken says whether s is a token of RFC 9110, as methods and header names are.
func isToken(s string) bool {
	for _, c := range []byte(s) {
		if !isAlnum(c) && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return s != ""
}

func isAlnum(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}
