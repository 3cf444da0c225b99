package exchange

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// inlineBytes is how large a body may be to stand in its command.
const inlineBytes = 8 << 10

type curl struct {
	w      *bufio.Writer
	bodies string // the directory; empty: there is none
	made   bool
}

// NewCurl writes a script for a POSIX shell with a curl command for each request.
// Short bodies of plain text stand in the command. Others are files in the
// directory bodies, which is made when it is needed, must not be there before,
// and has to stay beside the script; where bodies is empty they stand in the
// script as octal escapes.
//
// The commands send methods, targets, fields and bodies byte for byte, over
// HTTP/1.1. They do not send trailers, which is marked, nor HEAD requests with a
// body, which are left out. Curl writes Host first, and User-Agent and Accept
// before the others.
func NewCurl(w io.Writer, bodies string) (Writer, error) {
	c := &curl{w: bufio.NewWriterSize(w, 64<<10), bodies: bodies}
	_, _ = c.w.WriteString("#!/bin/sh\n# Requests that were captured by holdfast, in the order of their ids. Each command writes\n# the status of the answer and the id.\n")
	if bodies != "" {
		_, _ = c.w.WriteString("cd -- \"$(dirname -- \"$0\")\" || exit 1\n")
	}
	return c, c.w.Flush()
}

func (c *curl) Write(_ context.Context, item *Item) (Result, error) {
	// Nothing of a client's stands in this comment.
	fmt.Fprintf(c.w, "\n# %s received %s, %s", item.ID, item.ReceivedAt.UTC().Format(time.RFC3339Nano), item.State)
	if item.Last.Status != 0 {
		fmt.Fprintf(c.w, " (%d)", item.Last.Status)
	}
	_ = c.w.WriteByte('\n')
	hasBody := item.length > 0 || item.length == wire.Chunked
	left := ""
	switch {
	case item.Missing != "":
		left = item.Missing
	case item.Base == "":
		left = noBase
	case item.method == "HEAD" && hasBody:
		left = "curl sends no HEAD request with a body"
	}
	if left != "" {
		_, err := fmt.Fprintf(c.w, "# left out: %s\n", left)
		return Result{LeftOut, left}, err
	}
	r := Result{}
	if len(item.trailer) > 0 {
		r = Result{Marked, "curl sends no trailers"}
		_, _ = c.w.WriteString("# incomplete: curl sends no trailers\n")
	}
	data, err := c.body(item)
	if err != nil {
		return Result{}, err
	}
	_, _ = c.w.WriteString("curl -q --http1.1 --silent --show-error --output /dev/null --path-as-is --globoff")
	fmt.Fprintf(c.w, " \\\n  --write-out '%%{http_code} %s\\n'", item.ID)
	if item.method == "HEAD" {
		_, _ = c.w.WriteString(" --head") // else it would wait for a body
	} else {
		_, _ = c.w.WriteString(" --request " + quote(item.method))
	}
	fmt.Fprintf(c.w, " \\\n  --url %s --request-target %s", quote(item.Base+"/"), quote(item.target))
	c.headers(item)
	_, err = c.w.WriteString(data + "\n")
	return r, err
}

// headers writes the fields, and keeps those away that curl would add.
func (c *curl) headers(item *Item) {
	all := item.all()
	unwanted := []string{"User-Agent", "Accept"}
	if item.length != noFraming {
		unwanted = append(unwanted, "Content-Type", "Expect")
	}
	option := func(s string) { _, _ = c.w.WriteString(" \\\n  --header " + quote(s)) }
	for _, f := range all {
		switch {
		case f.Kind == wire.ContentLength: // curl counts
		case f.Value == "":
			option(f.Name + ";")
		default:
			option(f.Name + ": " + f.Value)
		}
	}
	for _, name := range unwanted {
		if !all.Has(name) {
			option(name + ":")
		}
	}
}

// body gives the option for the body. Where the body is to stand in front of the
// command it is written there.
func (c *curl) body(item *Item) (string, error) {
	data, inMemory := item.Body.Bytes()
	switch {
	case item.length == noFraming:
		return "", nil
	case inMemory && len(data) <= inlineBytes && plain(data):
		return " \\\n  --data-raw " + quote(string(data)), nil
	case c.bodies == "":
		_, _ = c.w.WriteString("printf '")
		if err := octal(c.w, item.Body.Reader()); err != nil {
			return "", err
		}
		_, err := c.w.WriteString("' | ")
		return " \\\n  --data-binary @-", err
	}
	if !c.made {
		if err := os.Mkdir(c.bodies, 0o700); err != nil {
			return "", err
		}
		c.made = true
	}
	name := item.ID.String()
	err := writeFile(filepath.Join(c.bodies, name), func(w io.Writer) error {
		_, err := io.Copy(w, item.Body.Reader())
		return err
	})
	return " \\\n  --data-binary " + quote("@"+filepath.Join(filepath.Base(c.bodies), name)), err
}

func (c *curl) Close() error { return c.w.Flush() }

// plain reports whether every shell and every editor leaves the text alone.
func plain(data []byte) bool {
	for _, b := range data {
		if (b < 0x20 || b > 0x7e) && b != '\n' && b != '\t' {
			return false
		}
	}
	return true
}

// quote makes one word of s for a POSIX shell. s holds no NUL.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// octal writes bytes so that printf of a POSIX shell, between single quotes, gives
// them.
func octal(w *bufio.Writer, r io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		for _, b := range buf[:n] {
			switch {
			case b > 0x20 && b < 0x7f && b != '\\' && b != '%' && b != '\'' && b != '-':
				_ = w.WriteByte(b)
			default:
				_, _ = w.Write([]byte{'\\', '0' + b>>6, '0' + b>>3&7, '0' + b&7})
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
