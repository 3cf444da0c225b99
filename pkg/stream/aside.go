package stream

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Aside is the message as the ledger keeps one that nobody can take. A
// redelivery, or another publication of the same spool record, has the same
// fingerprint. Data is the message's own.
func (m *Msg) Aside(kind string, reason error) ledger.Aside {
	a := ledger.Aside{
		Kind: kind, Reason: strings.ToValidUTF8(reason.Error(), "\uFFFD"), Subject: m.Subject,
		Header: m.headerLines(), Data: m.Data, At: time.Now(),
	}
	// An id that cannot be read is uuid.Nil; a completion has none in its header.
	if ids := m.Header[capture.HeaderID]; len(ids) > 0 {
		if id, err := uuid.Parse(ids[0]); err == nil {
			a.RequestID = id
		}
	}
	hash := sha256.New()
	for _, part := range [][]byte{[]byte(a.Subject), a.Header, a.Data} {
		// With its length, so that no two messages are one text.
		hash.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
		hash.Write(part)
	}
	hash.Sum(a.Fingerprint[:0])
	return a
}

// headerLines is the header as sorted lines.
func (m *Msg) headerLines() []byte {
	var b []byte
	for _, name := range slices.Sorted(maps.Keys(m.Header)) {
		for _, value := range m.Header[name] {
			b = append(b, name+": "+value+"\r\n"...)
		}
	}
	return b
}
