package embednats

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/gofrs/flock"
)

// layout is the version of what stands in the directory.
const layout = 1

const (
	lockFile    = "LOCK"
	versionFile = "VERSION"
	storeFolder = "jetstream" // nats-server's own
)

// claim makes the directory if there is none, takes its lock, and checks its
// version. Whatever it refuses is left as it is.
func claim(dir string) (*flock.Flock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make stream directory: %w", err)
	}
	// The directory holds whole requests with their credentials.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("protect stream directory: %w", err)
	}
	lock := flock.New(filepath.Join(dir, lockFile), flock.SetPermissions(0o600))
	held, err := lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock stream directory %s: %w", dir, err)
	}
	if !held {
		return nil, fmt.Errorf("stream directory %s: %w: stop the other one, or set another HOLDFAST_DATA_DIR", dir, ErrLocked)
	}
	if err := checkVersion(dir); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

func checkVersion(dir string) error {
	path := filepath.Join(dir, versionFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		// VERSION is durable before the server first writes: streams without one
		// are not ours, or somebody removed it.
		if _, err := os.Lstat(filepath.Join(dir, storeFolder)); err == nil {
			return fmt.Errorf("stream directory %s: %w: it holds streams but no file %s; if Holdfast made them, write %d into that file, else set another HOLDFAST_DATA_DIR",
				dir, ErrDamaged, versionFile, layout)
		}
		return writeVersion(dir)
	}
	if err != nil {
		return fmt.Errorf("read version of stream directory: %w", err)
	}
	version, err := strconv.Atoi(strings.TrimSpace(string(text)))
	switch {
	case err != nil || version < 1:
		return fmt.Errorf("stream directory %s: %w: %s holds %.20q and not a version; restore it from a backup, or move the directory away and start anew: what the spool has not released is published again",
			dir, ErrDamaged, versionFile, text)
	case version > layout:
		return fmt.Errorf("stream directory %s: %w: %d, this program knows %d; start the release that wrote it", dir, ErrNewerVersion, version, layout)
	}
	return nil
}

func writeVersion(dir string) error {
	if err := writeSynced(filepath.Join(dir, versionFile)); err != nil {
		return fmt.Errorf("write version of stream directory: %w", err)
	}
	return nil
}

// writeSynced puts the version under its name whole and durable, or not at all.
func writeSynced(path string) error {
	f, err := os.OpenFile(path+".tmp", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(layout) + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
