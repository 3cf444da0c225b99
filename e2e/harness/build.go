package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Build builds what a System runs into dir, from the tree at root, and gives the
// path of nats-server, which it builds too if make tools has not been run.
// GOFLAGS reach the compiler, so that a mutated build (-overlay) or one with the
// race detector is run alike.
func Build(ctx context.Context, root, dir string) (natsServer string, err error) {
	natsServer = filepath.Join(root, ".tools", "nats-server")
	if _, err := os.Stat(natsServer); err != nil {
		if err := command(ctx, root, "make", "tools"); err != nil {
			return "", err
		}
	}
	args := []string{"build", "-o", dir + "/", "./e2e/cmd/exampleapi"}
	for _, service := range []string{"ingress", "recorder", "acker", "replayer", "standalone"} {
		args = append(args, "./"+service+"/cmd/"+service)
	}
	return natsServer, command(ctx, root, "go", args...)
}

func command(ctx context.Context, root, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOWORK="+filepath.Join(root, "go.work"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return nil
}
