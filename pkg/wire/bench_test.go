package wire_test

import (
	"bufio"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// BenchmarkReadRequest reads a request like a browser's, here and by net/http.
func BenchmarkReadRequest(b *testing.B) {
	text := lines("POST /api/v1/orders?dry=0 HTTP/1.1", "Host: api.example.com", "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
		"Accept: application/json", "Accept-Language: en-US,en;q=0.5", "Accept-Encoding: gzip, deflate, br", "Content-Type: application/json",
		"Authorization: Bearer eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.e30.ZRrHA1JJJW8opsbCGfG_HACGpVUMN_a9IV7pAx_Zmeo",
		"X-Request-Id: 0190163d-8694-739b-aea5-966c26f8ad91", "Content-Length: 0", "Connection: keep-alive", "Cookie: session=abcdefghijklmnopqrstuvwxyz; theme=dark")
	b.Run("wire", func(b *testing.B) {
		b.ReportAllocs()
		src := strings.NewReader(text)
		r := wire.NewReader(src)
		var req wire.Request
		for b.Loop() {
			src.Reset(text)
			require.NoError(b, wire.ReadRequest(r, &req, headLimit, fieldLimit))
		}
	})
	b.Run("net_http", func(b *testing.B) {
		b.ReportAllocs()
		src := strings.NewReader(text)
		r := bufio.NewReader(src)
		for b.Loop() {
			src.Reset(text)
			_, err := http.ReadRequest(r)
			require.NoError(b, err)
		}
	})
}
