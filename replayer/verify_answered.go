package replayer

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/uuid"
)

// maxLogLine bounds a line of an access log: an ingress writes far shorter ones.
const maxLogLine = 1 << 20

// readAnswered takes the ids that an access log calls stored, with or without an
// answer: all of them were durable. Lines that are something else are passed
// over; a file without any line of an access log is an error, lest the wrong
// file prove everything well.
func (v *verifier) readAnswered(ctx context.Context, path string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("read access log %s: %w", path, err)
		}
	}()
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	plain := bufio.NewReaderSize(file, 64<<10)
	var lines io.Reader = plain
	if magic, _ := plain.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		unzipped, err := gzip.NewReader(plain)
		if err != nil {
			return err
		}
		lines = unzipped
	}
	scanner := bufio.NewScanner(lines)
	scanner.Buffer(make([]byte, 64<<10), maxLogLine)
	known := false
	for scanner.Scan() {
		var line struct {
			Msg    string    `json:"msg"`
			ID     uuid.UUID `json:"request_id"`
			Code   *int      `json:"code"`
			Stored string    `json:"stored"`
		}
		if !bytes.Contains(scanner.Bytes(), []byte(`"request_id"`)) || json.Unmarshal(scanner.Bytes(), &line) != nil {
			continue // a log holds other things, and its last line may be half written
		}
		if line.Msg != "request" || line.Code == nil || line.ID == uuid.Nil {
			continue
		}
		known = true
		if line.Stored == "" || line.Stored == "no" {
			continue
		}
		if err := v.see(ctx, sighting{id: line.ID, from: fromAnswered, counted: true}); err != nil {
			return err
		}
	}
	switch {
	case scanner.Err() != nil:
		return scanner.Err()
	case !known:
		return errors.New("no line of it is an access log's: it takes HOLDFAST_ACCESS_LOG=all and HOLDFAST_LOG_FORMAT=json")
	}
	return nil
}
