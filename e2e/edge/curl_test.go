package edge_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestCurl sends with curl what people send with curl.
func TestCurl(t *testing.T) {
	t.Parallel()
	curl, err := exec.LookPath("curl")
	require.NoError(t, err, "curl is missing: on Debian or Ubuntu, apt-get install curl")
	p := newPKI(t)
	type arrival struct{ description, sum string }
	seen := make(chan arrival, 10)
	api := startAPI(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		n, err := io.Copy(hash, r.Body)
		seen <- arrival{
			fmt.Sprintf("%s %s %d %v expect=%s upgrade=%s", r.Method, r.RequestURI, n, err, r.Header.Get("Expect"), r.Header.Get("Upgrade")),
			hex.EncodeToString(hash.Sum(nil)),
		}
		_, _ = fmt.Fprintf(w, "got %d\n", n) // curl reads it
	}))
	plain := startSystem(t, api).IngressURL()
	secure := "https://" + ingressAddr(startTLS(t, p, api))
	large := filepath.Join(t.TempDir(), "large")
	body := pseudorandom(8 * mib)
	require.NoError(t, os.WriteFile(large, body, 0o600))
	sum := sha256.Sum256(body)
	tooLarge := filepath.Join(t.TempDir(), "too-large")
	require.NoError(t, os.WriteFile(tooLarge, make([]byte, maxBody+1), 0o600))

	run := func(t *testing.T, stdin io.Reader, args ...string) (stdout, stderr string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, curl, append([]string{"--silent", "--verbose", "--cacert", p.caFile(), "--disable"}, args...)...)
		var out, errs bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
		require.NoError(t, cmd.Run(), errs.String())
		return out.String(), errs.String()
	}
	const protocol = "\\n%{http_version} %{http_code}"
	for _, c := range []struct {
		name    string
		stdin   bool
		args    []string
		version string
		shown   string // curl says so
	}{
		{"waits for 100 Continue", false, []string{"-T", large, "-H", "Expect: 100-continue", "--expect100-timeout", "600", plain + "/c"}, "1.1", "< HTTP/1.1 100 "},
		{"waits for 100 Continue over TLS", false, []string{"--http1.1", "-T", large, "-H", "Expect: 100-continue", "--expect100-timeout", "600", secure + "/c"}, "1.1", "< HTTP/1.1 100 "},
		{"HTTP/1.0", false, []string{"--http1.0", "-T", large, plain + "/c"}, "1.", ""},
		{"a body of unknown length", true, []string{"-T", "-", plain + "/c"}, "1.1", "> Transfer-Encoding: chunked"},
		{"a body of unknown length over HTTP/2", true, []string{"--http2", "-T", "-", secure + "/c"}, "2", ""},
		{"asks for h2c and gets HTTP/1.1", false, []string{"--http2", "-X", "PUT", "--data-binary", "@" + large, plain + "/c"}, "1.1", "> Upgrade: h2c"},
		{"HTTP/2", false, []string{"--http2", "-T", large, secure + "/c"}, "2", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var stdin io.Reader
			if c.stdin {
				stdin = bytes.NewReader(body)
			}
			out, shown := run(t, stdin, append([]string{"--write-out", protocol}, c.args...)...)
			require.Contains(t, out, fmt.Sprintf("got %d\n", len(body)), shown)
			require.Contains(t, out, "\n"+c.version)
			require.True(t, strings.HasSuffix(out, " 200"), out)
			require.Contains(t, shown, c.shown)
			require.Contains(t, strings.ToLower(shown), "< x-request-stored: synced")
			require.Equal(t, arrival{fmt.Sprintf("PUT /c %d <nil> expect= upgrade=", len(body)), hex.EncodeToString(sum[:])}, receive(t, seen))
		})
	}
	t.Run("a body above the limit is not sent", func(t *testing.T) {
		out, shown := run(t, nil, "-T", tooLarge, "-H", "Expect: 100-continue", "--expect100-timeout", "600", "--write-out", "%{size_upload} %{http_code}", plain+"/c")
		require.True(t, strings.HasSuffix(out, "0 413"), "%s\n%s", out, shown)
		require.NotContains(t, shown, "< HTTP/1.1 100 ")
	})
	t.Run("HEAD", func(t *testing.T) {
		_, shown := run(t, nil, "--head", plain+"/h")
		require.Contains(t, shown, "< HTTP/1.1 200 OK")
		receive(t, seen)
	})
	require.Empty(t, seen)
}
