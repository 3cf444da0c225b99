package edge_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// patience bounds waits for what takes milliseconds, or seconds on a busy
// machine.
const patience = 30 * time.Second

// What TestMain has built, and found.
var bin, nginx string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return 0, err
	}
	if bin, err = os.MkdirTemp("", "holdfast-bin-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := command(ctx, root, "go", "build", "-o", bin+"/", "./standalone/cmd/standalone"); err != nil {
		return 0, err
	}
	if err := command(ctx, root, "tools/need.sh", "nginx=nginx-light"); err != nil {
		return 0, err
	}
	if nginx, err = exec.LookPath("nginx"); err != nil {
		nginx = "/usr/sbin/nginx" // not in the path of ordinary users
	}
	code = m.Run()
	http.DefaultClient.CloseIdleConnections()
	if code == 0 {
		err = goleak.Find()
	}
	return code, err
}

func command(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK="+filepath.Join(dir, "go.work"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return nil
}

// startSystem starts standalone in front of the API at apiURL. Further settings
// are NAME=value, without the prefix. The test fails unless it stops, asked to,
// with exit code 0.
func startSystem(t *testing.T, apiURL string, settings ...string) *harness.System {
	t.Helper()
	o := harness.Options{
		Topology: harness.Standalone, Bin: bin, Dir: t.TempDir(), Upstream: apiURL,
		Settings: map[string]string{"ACCESS_LOG": "off"},
	}
	for _, s := range settings {
		name, value, ok := strings.Cut(s, "=")
		require.True(t, ok, "a setting is NAME=value: %s", s)
		o.Settings[name] = value
	}
	s, err := harness.New(o)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	require.NoError(t, s.Start(t.Context()))
	t.Cleanup(func() { require.NoError(t, s.Stop()) })
	return s
}

// startIngress is startSystem for tests that need no more of it than the host
// and port that clients dial.
func startIngress(t *testing.T, apiURL string, settings ...string) (addr string) {
	t.Helper()
	return strings.TrimPrefix(startSystem(t, apiURL, settings...).IngressURL(), "http://")
}

// startNginx starts Debian's nginx in front of the API at apiAddr, configured as
// a careful administrator would to pass everything on unchanged.
func startNginx(t *testing.T, apiAddr string) (addr string) {
	t.Helper()
	addr, err := proc.FreeAddr()
	require.NoError(t, err)
	ops, err := proc.FreeAddr()
	require.NoError(t, err)
	dir := t.TempDir()
	conf := fmt.Sprintf(`worker_processes 1; daemon off; pid %[1]s/pid; error_log %[1]s/error.log info;
events { worker_connections 1024; }
http {
  access_log off; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  large_client_header_buffers 8 64k; client_max_body_size 32m;
  client_body_timeout 2s; client_body_buffer_size 2m; proxy_max_temp_file_size 0;
  upstream api { server %[4]s; keepalive 16; }
  server { listen %[3]s; location / { return 200; } }
  server {
    listen %[2]s;
    location / {
      proxy_pass http://api; proxy_http_version 1.1;
      proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_next_upstream off; proxy_ignore_client_abort on; lingering_close off; proxy_read_timeout 1s;
    }
  }
}`, dir, addr, ops, apiAddr)
	path := filepath.Join(dir, "nginx.conf")
	require.NoError(t, os.WriteFile(path, []byte(conf), 0o600))
	p, err := proc.Start(proc.Spec{Name: "nginx", Path: nginx, Args: []string{"-c", path, "-p", dir, "-e", dir + "/error.log"}, Dir: dir})
	require.NoError(t, err)
	t.Cleanup(func() {
		// Its worker is not our child: the master has to end it.
		_, err := p.Stop(patience)
		require.NoError(t, err)
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, proc.AwaitHTTP(ctx, p, "http://"+ops+"/"))
	return addr
}
