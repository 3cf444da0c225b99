package embednats_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast-io/holdfast/pkg/embednats"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits for things that take milliseconds.
const patience = 20 * time.Second

func options(dir string) embednats.Options {
	return embednats.Options{
		StoreDir: dir, Addr: "127.0.0.1:0", MaxStoreBytes: 256 << 20,
		Logger: slog.New(slog.DiscardHandler),
	}
}

func start(t *testing.T, o embednats.Options) *embednats.Server {
	t.Helper()
	s, err := embednats.Start(o)
	require.NoError(t, err)
	t.Cleanup(func() { shutdown(t, s) })
	return s
}

func shutdown(t *testing.T, s *embednats.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	require.NoError(t, s.Shutdown(ctx))
}

func connect(t *testing.T, url string, o ...nats.Option) jetstream.JetStream {
	t.Helper()
	nc, err := nats.Connect(url, append(o, nats.MaxReconnects(-1), nats.ReconnectWait(time.Millisecond), nats.ReconnectJitter(0, 0))...)
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	return js
}

func makeStream(t *testing.T, js jetstream.JetStream, name string) {
	t.Helper()
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: name, Subjects: []string{name + ".>"}, Storage: jetstream.FileStorage,
		Discard: jetstream.DiscardNew, MaxBytes: 128 << 20,
	})
	require.NoError(t, err)
}

func TestKeepsMessagesOverRestarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "streams")
	s, err := embednats.Start(options(dir))
	require.NoError(t, err)
	js := connect(t, "", s.InProcess())
	makeStream(t, js, "A")
	_, err = js.Publish(t.Context(), "A.1", []byte("one"))
	require.NoError(t, err)

	// In place: the same clients go on, on the same address.
	url := s.ClientURL()
	require.NoError(t, s.Restart(t.Context()))
	require.Equal(t, url, s.ClientURL())
	require.NoError(t, s.Healthy())
	require.Eventually(t, func() bool {
		_, err := js.Publish(t.Context(), "A.2", []byte("two"))
		return err == nil
	}, patience, time.Millisecond)

	shutdown(t, s)
	require.ErrorIs(t, s.Healthy(), embednats.ErrStopped)
	require.ErrorIs(t, s.Restart(t.Context()), embednats.ErrStopped)
	shutdown(t, s) // once more does no harm

	s = start(t, options(dir))
	// The listener is for the nats command.
	js = connect(t, s.ClientURL())
	stream, err := js.Stream(t.Context(), "A")
	require.NoError(t, err)
	first, err := stream.GetMsg(t.Context(), 1)
	require.NoError(t, err)
	require.Equal(t, "one", string(first.Data))
	info, err := stream.Info(t.Context())
	require.NoError(t, err)
	require.GreaterOrEqual(t, info.State.Msgs, uint64(2))
}

func TestFilesAreTheOwnersAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "streams")
	s := start(t, options(dir))
	js := connect(t, "", s.InProcess())
	makeStream(t, js, "A")
	_, err := js.Publish(t.Context(), "A.1", []byte("secret"))
	require.NoError(t, err)
	info, err := os.Stat(dir)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o700), info.Mode().Perm())
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		require.Zero(t, info.Mode().Perm()&0o077, path)
		return nil
	}))
}

func TestRefusesASecondInstance(t *testing.T) {
	dir := t.TempDir()
	start(t, options(dir))
	_, err := embednats.Start(options(dir))
	require.ErrorIs(t, err, embednats.ErrLocked)
	require.ErrorContains(t, err, dir)
}

func TestRefusesAnAddressThatOthersReach(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "192.0.2.1:4222", "example.com:4222", "127.0.0.1", ""} {
		o := options(t.TempDir())
		o.Addr = addr
		_, err := embednats.Start(o)
		require.ErrorContains(t, err, fmt.Sprintf("address %q", addr))
	}
}

func TestRefusesAnAddressInUse(t *testing.T) {
	first := start(t, options(t.TempDir()))
	o := options(t.TempDir())
	o.Addr = first.ClientURL()[len("nats://"):]
	_, err := embednats.Start(o)
	require.ErrorContains(t, err, o.Addr)
	// The directory is free again.
	o.Addr = "127.0.0.1:0"
	start(t, o)
}

func TestRefusesWhatItCannotReadAndLeavesItAsItIs(t *testing.T) {
	// A directory with a stream and one message in it.
	made := func(t *testing.T) string {
		dir := t.TempDir()
		s, err := embednats.Start(options(dir))
		require.NoError(t, err)
		js := connect(t, "", s.InProcess())
		makeStream(t, js, "A")
		_, err = js.Publish(t.Context(), "A.1", []byte("one"))
		require.NoError(t, err)
		js.Conn().Close()
		shutdown(t, s)
		return dir
	}
	for name, c := range map[string]struct {
		harm func(t *testing.T, dir string)
		want error
	}{
		"newer version": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.WriteFile(filepath.Join(dir, "VERSION"), []byte("2\n"), 0o600))
			},
			embednats.ErrNewerVersion,
		},
		"garbage for a version": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.WriteFile(filepath.Join(dir, "VERSION"), []byte("\x00\xff"), 0o600))
			},
			embednats.ErrDamaged,
		},
		"no version": {
			func(t *testing.T, dir string) { require.NoError(t, os.Remove(filepath.Join(dir, "VERSION"))) },
			embednats.ErrDamaged,
		},
		"a stream's description is garbage": {
			func(t *testing.T, dir string) {
				meta := filepath.Join(dir, "jetstream", "$G", "streams", "A", "meta.inf")
				require.NoError(t, os.WriteFile(meta, []byte("garbage"), 0o600))
			},
			embednats.ErrDamaged,
		},
		"a stream's description is missing": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.Remove(filepath.Join(dir, "jetstream", "$G", "streams", "A", "meta.inf")))
			},
			embednats.ErrDamaged,
		},
		"a file in the place of the store": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.RemoveAll(filepath.Join(dir, "jetstream")))
				require.NoError(t, os.WriteFile(filepath.Join(dir, "jetstream"), []byte("x"), 0o600))
			},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := made(t)
			c.harm(t, dir)
			before := snapshot(t, dir)
			_, err := embednats.Start(options(dir))
			require.ErrorContains(t, err, dir)
			if c.want != nil {
				require.ErrorIs(t, err, c.want)
			}
			after := snapshot(t, dir)
			for path, data := range before {
				require.True(t, bytes.Equal(data, after[path]), "%s was altered", path)
			}
		})
	}
}

// snapshot reads the files that hold what was captured.
func snapshot(t *testing.T, dir string) map[string][]byte {
	files := make(map[string][]byte)
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		switch filepath.Ext(path) {
		case ".blk", ".inf", "":
			files[path], err = os.ReadFile(path)
		}
		return err
	}))
	require.NotEmpty(t, files)
	return files
}

func TestRecoversFromADiskThatTakesNoWrites(t *testing.T) {
	dir := t.TempDir()
	fill, free := disk(t, dir)
	s := start(t, options(dir))
	js := connect(t, "", s.InProcess())
	makeStream(t, js, "A")
	_, err := js.Publish(t.Context(), "A.1", []byte("kept"))
	require.NoError(t, err)

	fill()
	body := bytes.Repeat([]byte("x"), 64<<10)
	require.Eventually(t, func() bool {
		_, _ = js.PublishAsync("A.2", body)
		return s.Healthy() != nil
	}, patience, time.Millisecond)
	require.ErrorIs(t, s.Healthy(), embednats.ErrUnhealthy)
	free()
	require.ErrorIs(t, s.Healthy(), embednats.ErrUnhealthy, "nats-server recovers by itself now: Run is superfluous")

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	require.Eventually(t, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := js.Publish(ctx, "A.3", []byte("after"))
		return err == nil
	}, patience, 10*time.Millisecond)
	require.NoError(t, s.Healthy())
	stream, err := js.Stream(t.Context(), "A")
	require.NoError(t, err)
	first, err := stream.GetMsg(t.Context(), 1)
	require.NoError(t, err)
	require.Equal(t, "kept", string(first.Data))
	cancel()
	require.NoError(t, <-done)
}

// disk gives what makes writes below dir fail, and what lets them succeed
// again: a small file system that is really full where the process may mount
// one, elsewhere a limit on the size of this process's files.
func disk(t *testing.T, dir string) (fill, free func()) {
	t.Helper()
	err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m")
	if err != nil {
		t.Logf("files are limited in size, because a tmpfs cannot be mounted: %v", err)
		return limitFiles(t)
	}
	t.Log("a tmpfs is filled")
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	ballast := filepath.Join(dir, "ballast")
	return func() {
			f, err := os.Create(ballast)
			require.NoError(t, err)
			block := bytes.Repeat([]byte{1}, 64<<10)
			for err == nil {
				_, err = f.Write(block)
			}
			require.ErrorIs(t, err, unix.ENOSPC)
			require.NoError(t, f.Close())
		}, func() {
			require.NoError(t, os.Remove(ballast))
		}
}

func limitFiles(t *testing.T) (fill, free func()) {
	var usual unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &usual))
	set := func(max uint64) {
		require.NoError(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: max, Max: usual.Max}))
	}
	signal.Ignore(unix.SIGXFSZ) // else the first write too many ends the process
	free = func() { set(usual.Cur) }
	t.Cleanup(func() {
		free()
		signal.Reset(unix.SIGXFSZ)
	})
	return func() { set(256 << 10) }, free
}
