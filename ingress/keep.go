package ingress

import (
	"encoding/base64"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// keptPooled is the most of an answer whose buffers are kept for the next
// request.
const keptPooled = 64 << 10

// keptAnswer is what is kept of the API's answer on its way to the client.
type keptAnswer struct {
	answer *capture.Answer
	full   bool // no more is kept: enough is, or there is no memory for it
	whole  bool // the end has come
}

// beginKeeping keeps the beginning of the answer from here on. Nothing is
// promised to keep it: where the memory of requests in flight is taken, it is cut.
func (t *transaction) beginKeeping(resp *wire.Response) {
	k := &keptAnswer{answer: capture.NewAnswer(resp.Fields.Get("Content-Type"), resp.Fields.Get("Content-Encoding"))}
	k.answer.Body = t.b.kept[:0]
	if k.answer.Body == nil {
		k.answer.Body = []byte{}
	}
	t.kept = k
}

// add takes a part of the body; last says that it is the last one.
func (k *keptAnswer) add(t *transaction, part []byte, last bool) {
	k.whole = k.whole || last
	if len(part) == 0 {
		return
	}
	room := t.rt.KeepAnswers - len(k.answer.Body)
	if n := int64(min(len(part), room)); n > 0 && !k.full {
		// It is there twice while the record is made, once in base64.
		n += int64(base64.StdEncoding.EncodedLen(int(n)))
		if t.h.inflight.acquire(t.held, n) {
			t.held += n
		} else {
			k.full = true
		}
	}
	if k.full {
		k.answer.Cut = true
		return
	}
	k.answer.Keep(part, t.rt.KeepAnswers)
	t.b.kept = k.answer.Body
}

// end gives the answer for the outcome: none where the API gave none.
func (k *keptAnswer) end(status int) *capture.Answer {
	if status == 0 {
		return nil
	}
	k.answer.Cut = k.answer.Cut || !k.whole
	return k.answer
}
