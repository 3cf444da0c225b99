package spool

import (
	"errors"
	"fmt"
)

var (
	// ErrFull says that neither the limit nor the disk leaves room. It passes by
	// itself when records are released or the disk has room again.
	ErrFull = errors.New("spool is full")
	// ErrClosed says that the spool is closed or closing.
	ErrClosed = errors.New("spool is closed")
	// ErrBroken says that the disk refuses or takes too long. It passes by itself
	// when the disk works again.
	ErrBroken = errors.New("spool's disk refuses")
	// ErrTooLarge says that one record exceeds Options.MaxRecordBytes.
	ErrTooLarge = errors.New("record is too large for the spool")
	// ErrReservation says that a record exceeds what is left of its reservation.
	ErrReservation = errors.New("record exceeds its reservation")
	// ErrLocked says that another process, or another Spool of this one, has the
	// directory.
	ErrLocked = errors.New("spool directory is in use")
	// ErrNewer says that a newer version has written the directory.
	ErrNewer = errors.New("spool was written by a newer version")
	// ErrUnknown says that no record is known at a position.
	ErrUnknown = errors.New("unknown spool position")
	// ErrAsideFull says that no more records can be set aside.
	ErrAsideFull = errors.New("too many records set aside")

	errFreed = errors.New("segment is gone")
)

// DamageError says that a segment has lost bytes that were durable once, which
// no crash explains. Open returns it without having changed any file.
type DamageError struct {
	// File is the path of the damaged segment.
	File string
	// Offset is where the first invalid byte was expected to be valid.
	Offset int64
	// Following counts the valid records of the same file behind Offset.
	Following int
	// Reason says what is wrong there.
	Reason string
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("spool segment %s is damaged at offset %d (%s; %d valid records follow): "+
		"start once with HOLDFAST_SPOOL_SALVAGE=true to publish everything readable and keep the file as %s.damaged",
		e.File, e.Offset, e.Reason, e.Following, e.File)
}
