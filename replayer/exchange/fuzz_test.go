package exchange

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// takes reads all of a file and looks that what is taken of it is what a capture
// gives back.
func takes(t *testing.T, r Reader) {
	for {
		e, err := r.Next()
		if _, refused := errors.AsType[*ItemError](err); refused {
			continue
		}
		if err != nil {
			return
		}
		q, stored, digest, _, err := e.content("fallback.example")
		if err != nil {
			continue
		}
		item := Item{Size: int64(len(stored)), Body: NewBody()}
		require.NoError(t, item.read(q.appendHead(nil), bytes.NewReader(stored)))
		require.Equal(t, q.appendHead(nil), item.appendHead(nil))
		body, ok := item.Body.Bytes()
		require.True(t, ok)
		require.True(t, bytes.Equal(e.Body, body))
		require.Equal(t, digest, item.digest(item.Body.digest()))
	}
}

func FuzzGor(f *testing.F) {
	f.Add([]byte("1 ab 5\nPOST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nA: \xff\r\n\r\nx\n🐵🙈🙉\n2 ab 5\nx\n🐵🙈🙉\n"))
	f.Add([]byte("1 ab 5\nPOST /?# HTTP/1.0\r\n\r\n\n🐵🙈🙉\n"))
	f.Add([]byte("1 ab 5\nPOST http://h HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nConnection: a\r\nA: b\r\n\r\n1\r\nx\r\n0\r\nB: c\r\n\r\n\n🐵🙈🙉\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		takes(t, NewGorReader(bytes.NewReader(data), 1<<16))
	})
}

func FuzzHAR(f *testing.F) {
	f.Add([]byte(`{"log":{"entries":[{"startedDateTime":"2026-03-01T12:00:00Z","request":{"method":"POST","url":"http://h/?x#y",` +
		`"headers":[{"name":"A","value":"é","_encoding":"latin1"},{"name":":a","value":"b"}],"bodySize":2,"_target":"/é","_trailers":[{"name":"T","value":"1"}],` +
		`"postData":{"text":"eA==","_encoding":"base64"}},"_holdfast":{"id":"","digest":"","payload":"whole"}}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		takes(t, NewHARReader(bytes.NewReader(data)))
	})
}

// FuzzTarget: whatever a target is, HAR gives it back.
func FuzzTarget(f *testing.F) {
	for _, target := range []string{"*", "/", "//a", "/?", "/%zz", "/a b", "/é", "/\xff[]{}", "/?#"} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		if target == "" || strings.ContainsAny(target, " #") || target[0] != '/' && target != "*" {
			return
		}
		var out bytes.Buffer
		w, err := NewHAR(&out, "test")
		require.NoError(t, err)
		item := &Item{Base: "http://h", Body: NewBody(), request: request{method: "OPTIONS", target: target, host: "h", length: noFraming}}
		_, err = w.Write(t.Context(), item)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		r := NewHARReader(&out)
		e, err := r.Next()
		require.NoError(t, err)
		require.Equal(t, target, e.Target)
		_, err = r.Next()
		require.ErrorIs(t, err, io.EOF)
	})
}
