package service

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
)

// maxTokenFile bounds what is read of a token file: no token is near so long,
// and a wrong path may name anything.
const maxTokenFile = 64 << 10

// RequireToken makes a middleware that lets a request pass only with the bearer
// token in the file; others are answered 401 with a problem. With an empty file
// name everything passes: Load has made sure that this is meant.
//
// The file is looked at (one stat) at each request and read again when it has
// changed, so that a token is replaced, and the old one revoked, without a
// restart. A file that cannot be read later, or holds no token, leaves the last
// token in force, and is logged once for each change: a secret that is being
// swapped must lock nobody out. At first it must hold one.
func RequireToken(file string, logger *slog.Logger) (func(http.Handler) http.Handler, error) {
	if file == "" {
		return func(next http.Handler) http.Handler { return next }, nil
	}
	t := &tokenFile{path: file, logger: logger}
	if err := t.read(); err != nil {
		return nil, fmt.Errorf("read API token: %w", err)
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			token, ok := bearer(r)
			if ok && t.matches(token) {
				next.ServeHTTP(w, r)
				return
			}
			challenge, detail := `Bearer realm="holdfast"`, "this needs a bearer token"
			if ok {
				challenge, detail = challenge+`, error="invalid_token"`, "the bearer token is not valid"
			}
			w.Header().Set("WWW-Authenticate", challenge)
			WriteProblem(w, Problem{Status: http.StatusUnauthorized, Detail: detail})
		})
	}, nil
}

func bearer(r *http.Request) (string, bool) {
	values := r.Header.Values("Authorization")
	if len(values) != 1 {
		return "", false
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return "", false
	}
	return strings.TrimSpace(token), true
}

// tokenFile is the token in force. It is safe for concurrent use.
type tokenFile struct {
	path   string
	logger *slog.Logger

	mu   sync.Mutex
	seen os.FileInfo
	gone bool
	sum  [sha256.Size]byte
}

// matches compares sums, so that the time taken tells neither the token's
// content nor its length.
func (t *tokenFile) matches(token string) bool {
	given := sha256.Sum256([]byte(token))
	t.mu.Lock()
	t.refresh()
	sum := t.sum
	t.mu.Unlock()
	return subtle.ConstantTimeCompare(given[:], sum[:]) == 1
}

// refresh reads the file again when it has changed. The caller holds mu.
func (t *tokenFile) refresh() {
	info, err := os.Stat(t.path)
	if err != nil {
		if !t.gone {
			t.gone = true
			t.logger.Error("cannot read the API token again, the last one stays in force", "err", err)
		}
		return
	}
	if !t.gone && os.SameFile(info, t.seen) && info.ModTime().Equal(t.seen.ModTime()) && info.Size() == t.seen.Size() {
		return
	}
	t.gone = false
	if err := t.read(); err != nil {
		t.seen = info
		t.logger.Error("cannot read the API token again, the last one stays in force", "err", err)
		return
	}
	t.logger.Info("the API token was read again")
}

// read takes the token from the file. The caller holds mu, or is alone.
func (t *tokenFile) read() error {
	f, err := os.Open(t.path)
	if err != nil {
		return err
	}
	defer f.Close()
	// What the open file is, not what the path has become since.
	info, err := f.Stat()
	if err != nil {
		return err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return err
	}
	token := bytes.TrimSpace(text)
	if len(text) > maxTokenFile || len(token) == 0 || bytes.ContainsAny(token, " \t\r\n") {
		return ErrNoToken
	}
	t.seen, t.sum = info, sha256.Sum256(token)
	return nil
}
