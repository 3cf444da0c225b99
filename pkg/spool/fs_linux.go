package spool

import (
	"errors"

	"golang.org/x/sys/unix"
)

func (f osFile) Allocate(size int64) error {
	err := retry(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, size) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return f.fillZeros(size)
	}
	return err
}

func (f osFile) Datasync() error {
	return retry(func() error { return unix.Fdatasync(int(f.Fd())) })
}

func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
