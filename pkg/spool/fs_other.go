//go:build !linux

package spool

func (f osFile) Allocate(size int64) error { return f.fillZeros(size) }

func (f osFile) Datasync() error { return f.Sync() }
