package ledgertest

import (
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

func (b *bench) answers(id uuid.UUID) []ledger.Answer {
	list, err := b.s.Answers(b.ctx, id)
	b.NoError(err)
	return list
}

// answered is an outcome with an answer.
func (b *bench) answered(id uuid.UUID, v capture.Verdict, a capture.Answer) ledger.Fact {
	f := b.outcome(id, v, 200)
	f.Outcome.Answer = &a
	return f
}

var binaryAnswer = capture.Answer{Type: "text/\xff", Encoding: "gzip", Cut: true, Body: []byte("\x00\xff answer")}

var answerTests = map[string]func(*bench){
	"an answer is kept once, and with the request": func(b *bench) {
		known, early, never := b.captured(1)[0], newID(), newID()
		for range 2 {
			b.complete(b.answered(known, capture.Processed, binaryAnswer), b.answered(early, capture.Failed, binaryAnswer))
		}
		b.complete(b.answered(known, capture.Processed, capture.Answer{Body: []byte("another")}))
		b.record(b.inline(early))
		for _, id := range []uuid.UUID{known, early} {
			b.Equal([]ledger.Answer{{Attempt: 1, Answer: binaryAnswer}}, b.answers(id))
			b.Equal(b.get(id).Facts.Attempts[0].Status, b.get(id).Status)
		}
		b.Empty(b.answers(never))
		b.recount()
		b.complete(event(early, capture.Processed, 1))
		b.recount()
		b.reopen()
		b.recount()
	},
	"the answer comes after the request is processed": func(b *bench) {
		ids := b.captured(2)
		b.complete(event(ids[0], capture.Processed, 1))
		b.complete(b.answered(ids[0], capture.Processed, binaryAnswer))
		b.recount()
		b.clock.add(time.Second)
		b.complete(event(ids[1], capture.Processed, 1))
		b.clock.add(time.Second)
		b.complete(b.answered(ids[1], capture.Processed, binaryAnswer))
		b.Len(b.answers(ids[1]), 1)
		b.recount()
	},
	"an answer that is too large is refused, and the others are kept": func(b *bench) {
		ids := b.captured(2)
		errs, err := b.s.Complete(b.ctx, []ledger.Fact{
			b.answered(ids[0], capture.Processed, capture.Answer{Body: make([]byte, capture.MaxAnswer+1)}),
			b.answered(ids[1], capture.Processed, capture.Answer{Body: make([]byte, capture.MaxAnswer)}),
		})
		b.NoError(err)
		b.Error(errs[0])
		b.NoError(errs[1])
		b.Empty(b.answers(ids[0]))
		b.Len(b.answers(ids[1])[0].Body, capture.MaxAnswer)
		b.recount()
	},
	"answers of runs, and what a test replay has": func(b *bench) {
		ids := b.failed(3)
		run, own := b.openRun(ledger.Filter{IDs: ids[:1]}, "")
		e := b.result(own, b.begun(own, ids[0]), capture.Processed, 200)
		e.Answer = &capture.Answer{Body: []byte("own")}
		b.NoError(b.end(own, e, e)[0])
		b.Equal([]ledger.Answer{{Attempt: 2, Run: run.ID, Answer: *e.Answer}}, b.answers(ids[0]))
		b.recount()

		test, l := b.openRun(ledger.Filter{}, "http://test.example")
		before := []ledger.Detail{b.get(ids[1]), b.get(ids[2])}
		for n, v := range []capture.Verdict{capture.Failed, capture.Processed} {
			for i, id := range ids[1:] {
				e := b.result(l, b.begun(l, id), v, 500-300*n)
				if i == 0 {
					e.Answer = &capture.Answer{Body: []byte{byte(n)}}
				}
				b.NoError(b.end(l, e)[0])
			}
		}
		b.Equal(before, []ledger.Detail{b.get(ids[1]), b.get(ids[2])})
		b.Equal([]ledger.Answer{
			{Attempt: 3, Run: test.ID, Elsewhere: true, Answer: capture.Answer{Body: []byte{1}}},
		}, b.answers(ids[1]))
		tested, err := b.s.Tested(b.ctx, test.ID, uuid.Nil, 1)
		b.NoError(err)
		b.Len(tested, 1)
		rest, err := b.s.Tested(b.ctx, test.ID, tested[0].ID, 10)
		b.NoError(err)
		tested = append(tested, rest...)
		b.Len(tested, 2)
		for i, one := range tested {
			b.Equal(before[i].Request, one.Request)
			b.Equal(3, one.Attempt.Number)
			b.Equal(200, one.Attempt.Status)
			b.Equal(capture.Processed, one.Attempt.Verdict)
		}
		// The next test replay's takes its place, once this one has ended.
		processed := b.captured(1)[0]
		b.complete(b.answered(processed, capture.Processed, binaryAnswer))
		all := ledger.Filter{States: []capture.State{capture.StateProcessed, capture.StateFailed}}
		for n, want := range []int{2, 1, 1} {
			_, again := b.openRun(all, "http://test.example")
			for _, id := range []uuid.UUID{ids[1], processed} {
				e := b.result(again, b.begun(again, id), capture.Processed, 200)
				e.Answer = &capture.Answer{Body: make([]byte, 100*n)}
				b.NoError(b.end(again, e)[0])
			}
			b.Len(b.answers(processed), 2, "its own, and this one's")
			b.Len(b.answers(ids[1]), want)
			b.recount()
			b.NoError(b.s.EndRun(b.ctx, again, nil))
			if n == 0 {
				b.NoError(b.s.EndRun(b.ctx, l, nil))
			}
		}
		none, err := b.s.Tested(b.ctx, run.ID, uuid.Nil, 10)
		b.NoError(err)
		b.Empty(none, "it sent to no other target")
		_, err = b.s.Tested(b.ctx, "nobody", uuid.Nil, 10)
		b.ErrorIs(err, ledger.ErrNotFound)
		b.recount()
	},
	"answers go with what they belong to": func(b *bench) {
		retention := ledger.Retention{KeepProcessed: time.Hour, Retention: 72 * time.Hour}
		id, never := b.captured(1)[0], newID()
		b.complete(b.answered(id, capture.Processed, binaryAnswer), b.answered(never, capture.Processed, binaryAnswer))
		b.clock.add(2 * time.Hour)
		_, _, err := b.s.Expire(b.ctx, retention, 100)
		b.NoError(err)
		b.Empty(b.answers(id), "with the payload")
		b.Len(b.answers(never), 1)
		// A repeated outcome brings nothing back.
		b.complete(b.answered(id, capture.Processed, binaryAnswer))
		b.Empty(b.answers(id))
		b.True(b.get(id).PayloadExpired)
		b.clock.add(96 * time.Hour)
		_, _, err = b.s.Expire(b.ctx, retention, 100)
		b.NoError(err)
		b.Empty(b.answers(never))
		b.recount()
	},
}
