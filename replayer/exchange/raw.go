package exchange

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

type raw struct{ dir string }

// NewRaw writes each request as an HTTP/1.1 message into a file of its own in
// dir, <id>.http, which sorts in the order of ids. A body that was captured with
// trailers is in the chunked coding.
func NewRaw(dir string) Writer { return raw{dir} }

func (w raw) Write(_ context.Context, item *Item) (Result, error) {
	if item.Missing != "" {
		return Result{LeftOut, item.Missing}, nil
	}
	head := item.appendHead(nil, item.uuidField())
	return Result{}, writeFile(filepath.Join(w.dir, item.ID.String()+".http"), func(f io.Writer) error {
		if item.length == wire.Chunked && item.Body.Size() > 0 {
			head = wire.AppendChunkSize(head, item.Body.Size())
		}
		if _, err := f.Write(head); err != nil {
			return err
		}
		if _, err := io.Copy(f, item.Body.Reader()); err != nil {
			return err
		}
		if item.length != wire.Chunked {
			return nil
		}
		var end []byte
		if item.Body.Size() > 0 {
			end = append(end, "\r\n"...)
		}
		_, err := f.Write(wire.AppendLastChunk(end, item.trailer))
		return err
	})
}

func (w raw) Close() error { return nil }

// writeFile makes a file for its owner alone. One that is there already is an
// error.
func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Close()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
