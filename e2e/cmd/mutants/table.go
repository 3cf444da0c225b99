package main

import (
	"fmt"
	"strings"
)

// mutant is one way to break the code, and the test that must notice.
type mutant struct {
	name   string
	breaks string // what users would lose
	file   string // from the root
	// old stands in the file exactly once; it is replaced by new.
	old, new string
	pkg      string // from the root
	test     string // of it; parts of a subtest's name are joined by /
}

// apply gives the text of the file with the mutation.
func (m mutant) apply(text string) (string, error) {
	if n := strings.Count(text, m.old); n != 1 {
		return "", fmt.Errorf("mutant %s: its old text stands %d times in %s, not once; the code has changed, change the mutant with it", m.name, n, m.file)
	}
	return strings.Replace(text, m.old, m.new, 1), nil
}

var mutants = []mutant{
	// The ingress: capture and answer.
	{
		name: "answer-before-fsync", breaks: "an answer says stored, and a power cut takes the request",
		file: "ingress/handler.go",
		old:  "\terr := t.waitSynced()\n",
		new:  "\tvar err error\n",
		pkg:  "ingress", test: "TestAnswerIsHeldUntilFsync",
	},
	{
		name: "stored-said-when-fsync-failed", breaks: "X-Request-Stored says synced when nothing is",
		file: "ingress/handler.go",
		old:  "\t\t// an attempt, lest a processed request be sent again.\n\t\tt.state = storedNo\n",
		new:  "\t\t// an attempt, lest a processed request be sent again.\n\t\tt.state = storedSynced\n",
		pkg:  "ingress", test: "TestFsyncFails",
	},
	{
		name: "outcome-after-the-last-byte", breaks: "kill -9 after the answer makes a repeat",
		file: "ingress/answer.go",
		old:  "\t\t\tt.outcome(resp.Status, verdict, \"\")\n\t\t\tt.x.WriteLimit(time.Time{})\n\t\t\t_ = t.x.Write(part)\n\t\t\t_ = t.x.End(trailerFields(api.Trailer()))\n",
		new:  "\t\t\tt.x.WriteLimit(time.Time{})\n\t\t\t_ = t.x.Write(part)\n\t\t\t_ = t.x.End(trailerFields(api.Trailer()))\n\t\t\ttime.Sleep(20 * time.Millisecond)\n\t\t\tt.outcome(resp.Status, verdict, \"\")\n",
		pkg:  "ingress", test: "TestOutcomeBeforeTheLastByte",
	},
	{
		name: "outcome-after-a-short-answer", breaks: "kill -9 after the answer makes a repeat",
		file: "ingress/answer.go",
		old: `		// The whole answer is here, and nothing has gone out yet.
		t.outcome(resp.Status, verdict, "")
`,
		new: `		defer func() {
			time.Sleep(20 * time.Millisecond)
			t.outcome(resp.Status, verdict, "")
		}()
`,
		pkg: "ingress", test: "TestOutcomeBeforeTheLastByte",
	},
	{
		name: "client-cancels-upstream", breaks: "a client that leaves takes its captured request with it",
		file: "ingress/answer.go",
		old:  "\t\tif !t.captured && gone {\n",
		new:  "\t\tif gone {\n",
		pkg:  "ingress", test: "TestClientThatIsTooSlow",
	},
	{
		name: "gateway-retries-502", breaks: "the API gets a request twice from one try",
		file: "ingress/handler.go",
		old:  "\t\tresp, err = api.Answer(t.passInterim)\n\t\tt.answered = err == nil\n",
		new:  "\t\tif resp, err = api.Answer(t.passInterim); err != nil {\n\t\t\tif again, err2 := t.rt.pool.Begin(time.Now().Add(t.rt.Policy.Timeout), t.x.Request.Method, 0, t.b.body, t.headForAPI()...); err2 == nil {\n\t\t\t\tdefer again.Close()\n\t\t\t\tapi = again\n\t\t\t\tresp, err = api.Answer(nil)\n\t\t\t}\n\t\t}\n\t\tt.answered = err == nil\n",
		pkg:  "ingress", test: "TestAPIResetsOrCutsItsAnswer",
	},
	{
		name: "cut-answer-counts-as-whole", breaks: "an answer that was cut short counts as processed",
		file: "ingress/answer.go",
		old:  "\t\t\tt.outcome(resp.Status, capture.Failed, clip(err.Error()))\n\t\t\t_ = t.x.Write(part)\n",
		new:  "\t\t\tt.outcome(resp.Status, verdict, clip(err.Error()))\n\t\t\t_ = t.x.Write(part)\n",
		pkg:  "ingress", test: "TestAPIResetsOrCutsItsAnswer",
	},
	{
		name: "forwarded-though-not-stored", breaks: "the API works on a request that nobody has stored",
		file: "ingress/handler.go",
		old:  "\tif t.rt.Mode == route.BestEffort {\n\t\treturn true\n\t}\n\tt.h.log.Debug(",
		new:  "\tif t.rt.Mode != route.Off {\n\t\treturn true\n\t}\n\tt.h.log.Debug(",
		pkg:  "ingress", test: "TestNoRoomForALargeBody",
	},
	{
		name: "empty-body-with-trailers-ends-twice", breaks: "the gateway itself smuggles a request",
		file: "ingress/handler.go",
		old:  "\t\t\tif len(t.b.body) > 0 { // an empty chunk would be the end\n",
		new:  "\t\t\tif len(t.b.body) >= 0 {\n",
		pkg:  "ingress", test: "TestTrailersOfARequest",
	},
	{
		name: "both-lengths-taken", breaks: "a request within a request reaches the API",
		file: "pkg/wire/request.go",
		old:  "\tcase coding != nil && length != nil:\n",
		new:  "\tcase coding != nil && length != nil && coding.Value == \"\":\n",
		pkg:  "pkg/wire", test: "TestRequestsThatAreRefused",
	},
	{
		name: "kelvin-sign-is-a-k", breaks: "a coding that the API does not know frames the body here",
		file: "pkg/wire/fields.go",
		old:  "func Equal(a, b string) bool { return len(a) == len(b) && strings.EqualFold(a, b) }\n",
		new:  "func Equal(a, b string) bool { return strings.EqualFold(a, b) }\n",
		pkg:  "pkg/wire", test: "TestTokensCompareByASCIIAlone",
	},
	// The ingress: spool and streams.
	{
		name: "nothing-published-after-a-start", breaks: "what was in the spool at a crash stays there",
		file: "ingress/publisher.go",
		old:  "\treader := p.spool.NewReader()\n\tfor {\n",
		new:  "\treader := p.spool.NewReader()\n\tfor {\n\t\tif rec, ok, err := reader.TryNext(); err == nil && ok && rec.Position.Start != p.spool.Start() {\n\t\t\tcontinue\n\t\t} else if ok {\n\t\t\treader.Rewind(rec.Position)\n\t\t}\n",
		pkg:  "ingress", test: "TestKilledAtAnyPoint",
	},
	{
		name: "nothing-published-after-a-disconnect", breaks: "what was under way at a disconnect stays in the spool",
		file: "ingress/publisher.go",
		old: `			p.window.failAll()
		case <-back:
			p.doubt(time.Now())
`,
		new: `			p.window.mu.Lock()
			for n := p.window.first; n < p.window.next; n++ {
				p.window.entries[n%windowRecords].settled = true
			}
			p.window.shrink()
			p.window.mu.Unlock()
		case <-back:
`,
		pkg: "ingress", test: "TestWhatWasUnderWayIsPublishedAgain",
	},
	{
		name: "released-by-puback", breaks: "a broker that loses what it acknowledged loses requests",
		file: "ingress/publisher.go",
		old:  "\tsub, err := p.nc.Subscribe(inbox+\".>\", p.window.acknowledge)\n",
		new: `	sub, err := p.nc.Subscribe(inbox+".>", func(m *nats.Msg) {
		p.window.mu.Lock()
		first := p.window.first
		p.window.mu.Unlock()
		p.window.acknowledge(m)
		p.window.mu.Lock()
		defer p.window.mu.Unlock()
		for n := first; n < p.window.first; n++ {
			for _, at := range p.window.entries[n%windowRecords].positions() {
				p.spool.Release(at.Start, spool.Range{First: at.Index, Last: at.Index})
			}
		}
	})
`,
		pkg: "ingress", test: "TestServerRestarts",
	},
	{
		name: "unreleased-is-never-published-again", breaks: "a lost word, or a stream that was cut back, keeps requests out of the ledger",
		file: "ingress/publisher.go",
		old:  "\t\tn, err := p.pass(ctx, reader, func(rec spool.Record) (bool, error) {\n",
		new:  "\t\tn, err := p.pass(ctx, reader, func(rec spool.Record) (bool, error) {\n\t\t\tif rec.Position.Index > 0 {\n\t\t\t\treturn true, nil\n\t\t\t}\n",
		pkg:  "ingress", test: "TestLostWords",
	},
	// The spool.
	{
		name: "word-ignores-the-start", breaks: "a word from before a power cut releases what it does not mean",
		file: "pkg/spool/spool.go",
		old:  "\t\tif seg.start != start || seg.live == 0 {\n",
		new:  "\t\tif seg.live == 0 {\n",
		pkg:  "pkg/spool", test: "TestAWordAfterARestartDoesNotReleaseTheSameIndexOfTheNewStart",
	},
	{
		name: "torn-tail-accepted", breaks: "half a request is published as a whole one",
		file: "pkg/spool/segment.go",
		old:  "\t\tif crc32.Checksum(rec.data, castagnoli()) != sum {\n",
		new:  "\t\tif crc32.Checksum(rec.data, castagnoli()) != sum && length < 0 {\n",
		pkg:  "pkg/spool", test: "TestTornAtEveryByteOfTheLastRecord",
	},
	{
		name: "fsync-error-ignored", breaks: "stored is said of what the disk has refused",
		file: "pkg/spool/append.go",
		old:  "\t\tif errs[i] != nil {\n",
		new:  "\t\tif errs[i] != nil && t.off < 0 {\n",
		pkg:  "pkg/spool", test: "TestFsyncErrorGivesTheSegmentUpAndNothingElse",
	},
	{
		name: "nothing-is-fsynced", breaks: "a power cut takes what was promised",
		file: "pkg/spool/append.go",
		old:  "\t\terrs = append(errs, t.seg.file.Datasync())\n",
		new:  "\t\terrs = append(errs, nil)\n\t\t_ = t\n",
		pkg:  "pkg/spool", test: "TestPowerLossLosesNothingThatWasSynced",
	},
	{
		name: "segment-freed-too-early", breaks: "records that nobody else has are deleted",
		file: "pkg/spool/spool.go",
		old:  "\tif seg.freed || !seg.sealed || seg.live > 0 || seg.refs > 0",
		new:  "\tif seg.freed || !seg.sealed || seg.live > 1 || seg.refs > 0",
		pkg:  "pkg/spool", test: "TestModel",
	},
	// Streams.
	{
		name: "ack-before-commit", breaks: "a crash between acknowledgement and commit loses a batch",
		file: "pkg/stream/consumer.go",
		old:  "\t\terr := handle(commitCtx, b.messages)\n",
		new:  "\t\tc.answer(b, func(*Msg) []byte { return nil })\n\t\terr := handle(commitCtx, b.messages)\n",
		pkg:  "pkg/stream", test: "TestNothingIsAcknowledgedBeforeItsCommit",
	},
	{
		name: "ack-on-another-connection", breaks: "after a rollback an acknowledgement hits another message",
		file: "pkg/stream/consumer.go",
		old:  "\tif c.o.Conn.Stats().Reconnects != b.reconnects {\n",
		new:  "\tif c.o.Conn.Stats().Reconnects < b.reconnects {\n",
		pkg:  "pkg/stream", test: "TestAcknowledgesOnlyOnTheConnectionThatBroughtTheMessage",
	},
	{
		name: "trimmed-past-the-ack-floor", breaks: "a stream is trimmed of what is not committed",
		file: "pkg/stream/trim.go",
		old:  "\tkeep = min(keep, floor+1, s.LastSeq)\n",
		new:  "\tkeep = min(keep, s.LastSeq)\n",
		pkg:  "pkg/stream", test: "TestTrimmingNeverTouchesWhatIsNotAcknowledged",
	},
	// Recorder and acker.
	{
		name: "recorder-word-before-commit", breaks: "the spool gives up a request that no ledger has",
		file: "recorder/record.go",
		old:  "\tif len(w.items) > 0 {\n\t\tresults, err := w.store.Record(ctx, w.items)\n",
		new:  "\tfor i := range w.items {\n\t\tw.words.Add(w.items[i].Ref)\n\t}\n\tw.words.Publish()\n\tif len(w.items) > 0 {\n\t\tresults, err := w.store.Record(ctx, w.items)\n",
		pkg:  "recorder", test: "TestNoWordAndNoAckBeforeTheCommit",
	},
	{
		name: "no-word-for-a-repeat", breaks: "a lost word is never made up for, and the spool fills",
		file: "pkg/ledger/sqlite/record.go",
		old:  "\tif known {\n\t\treturn released(ref), nil\n\t}\n\tif int64(len(r.Body)) != r.Size {\n",
		new:  "\tif known {\n\t\treturn released(), nil\n\t}\n\tif int64(len(r.Body)) != r.Size {\n",
		pkg:  "recorder", test: "TestRepeatsEarnTheirWord",
	},
	{
		name: "recorder-drops-poison", breaks: "what cannot be taken is gone without a trace",
		file: "recorder/record.go",
		old:  "\tif len(aside) > 0 {\n\t\tif err := w.store.SetAside(ctx, aside); err != nil {\n",
		new:  "\tif len(aside) > 0 {\n\t\tif err := w.store.SetAside(ctx, nil); err != nil {\n",
		pkg:  "recorder", test: "TestPoisonIsSetAsideAndHoldsUpNothing",
	},
	{
		name: "acker-word-before-commit", breaks: "the spool gives up an outcome that no ledger has",
		file: "acker/batch.go",
		old:  "\tat := 0\n\tfor part := range slices.Chunk(facts, maxFacts) {\n",
		new:  "\tfor i := range batch {\n\t\tif ref, ok := capture.ParseSpoolRef(batch[i].Header); ok {\n\t\t\ts.words.Add(ref)\n\t\t}\n\t}\n\ts.words.Publish()\n\tat := 0\n\tfor part := range slices.Chunk(facts, maxFacts) {\n",
		pkg:  "acker", test: "TestWordsComeAfterTheCommit",
	},
	{
		name: "accepted-before-commit", breaks: "202 is said of a completion that a crash takes",
		file: "acker/http.go",
		old:  "\trefused, err := a.committer.submit(r.Context(), eventFacts(events))\n",
		new:  "\tvar refused []error\n\tvar err error\n\ta.committer.queue <- &submission{facts: eventFacts(events), done: make(chan result, 1)}\n",
		pkg:  "acker", test: "TestALockedLedgerHoldsUpNothingForGood",
	},
	{
		name: "api-releases-spool-records", breaks: "an API's event drops a record from the spool",
		file: "acker/batch.go",
		old:  "\t\tif capture.IsOutcomeSubject(batch[i].Subject) {\n",
		new:  "\t\tif batch[i].Subject != \"\" {\n",
		pkg:  "acker", test: "TestAnEventSubjectCarriesNoOutcomesAndReleasesNothing",
	},
	// The ledger.
	{
		name: "no-dedupe-by-uuid", breaks: "a repeat is a second request, or blocks the first",
		file: "pkg/ledger/sqlite/record.go",
		old:  "\tif known {\n\t\treturn released(ref), nil\n\t}\n\tif int64(len(r.Body)) != r.Size {\n",
		new:  "\tif known {\n\t\tr.ID = uuid.New()\n\t}\n\tif int64(len(r.Body)) != r.Size {\n",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/duplicates_over_batches",
	},
	{
		name: "chunks-without-hash", breaks: "a body that was garbled on its way is sent",
		file: "pkg/ledger/sqlite/record.go",
		old:  "size != a.size || sum != a.sha256 {\n",
		new:  "size != a.size || sum == \"\" {\n",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/a_wrong_hash",
	},
	{
		name: "late-abandon-deletes-a-body", breaks: "an abandon record that comes late deletes a complete request's body",
		file: "pkg/ledger/sqlite/record.go",
		old:  "\tif found && have.status != assemblyChunks {\n\t\treturn released(ref), nil\n\t}\n",
		new:  "\t_ = have\n",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/an_abandon_record_does_nothing_to_a_known_head",
	},
	{
		name: "early-completion-dropped", breaks: "a completion that comes before its request is lost, and the request is sent again",
		file: "pkg/ledger/sqlite/record.go",
		old:  "\tif err != nil || len(attempts)+len(events) == 0 {\n\t\treturn err\n\t}\n",
		new:  "\tif err != nil || len(attempts)+len(events) >= 0 {\n\t\treturn err\n\t}\n",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/completion_before_capture",
	},
	{
		name: "open-requests-expire", breaks: "an open request is deleted after the retention",
		file: "pkg/ledger/sqlite/expire.go",
		old:  "\t\t\"WHERE kept = 0 AND state >= 3 AND changed < ?",
		new:  "\t\t\"WHERE kept = 0 AND state >= 0 AND changed < ?",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/retention_drops_what_is_closed_and_never_what_is_open",
	},
	{
		name: "attempt-begun-in-any-state", breaks: "what is processed is sent again",
		file: "pkg/ledger/sqlite/replay.go",
		old:  "\tcase u.row.seq > run.MaxSeq || !sends(run, &req, u.row.matchStatus):\n",
		new:  "\tcase u.row.seq > run.MaxSeq || req.Size < 0:\n",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/only_what_may_be_sent_is_selected_and_begun",
	},
	{
		name: "lease-not-checked", breaks: "two replays send the same request",
		file: "pkg/ledger/sqlite/replay.go",
		old:  "\tcase until > t.now:\n",
		new:  "\tcase until > t.now && u.row.seq < 0:\n",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/two_runs_at_once_never_both_begin_one_id",
	},
	{
		name: "processed-ones-are-replayed", breaks: "what is processed is sent again",
		file: "pkg/ledger/filter.go",
		old:  "\tdefault:\n\t\treturn false\n\t}\n\treturn f.Selects(r, matchStatus)\n",
		new:  "\t}\n\treturn f.Selects(r, matchStatus)\n",
		pkg:  "pkg/ledger/sqlite", test: "TestConformance/only_what_may_be_sent_is_selected_and_begun",
	},
	// The vocabulary.
	{
		name: "a-later-failure-unprocesses", breaks: "what one attempt has processed is sent again because another one failed",
		file: "pkg/capture/state.go",
		old:  "\t\tif a.Verdict == Processed {\n\t\t\treturn StateProcessed\n\t\t}\n",
		new:  "\t\tif a.Verdict == Processed && len(f.Attempts) == 1 {\n\t\t\treturn StateProcessed\n\t\t}\n",
		pkg:  "pkg/capture", test: "TestState",
	},
	{
		name: "clients-set-our-headers", breaks: "a client forges the gateway's own headers",
		file: "pkg/capture/names.go",
		old:  "strings.ReplaceAll(strings.ToLower(name), \"_\", \"-\")",
		new:  "strings.ToLower(name)",
		pkg:  "ingress", test: "TestOwnHeaders",
	},
	// The replayer.
	{
		name: "fence-skipped", breaks: "what was completed and is on its way to the ledger is sent again",
		file: "replayer/fence.go",
		old:  "\tbegan := f.Clock.Now()\n\tvar p passage\n",
		new:  "\tbegan := f.Clock.Now()\n\tvar p passage\n\tif began.Unix() > 0 {\n\t\treturn nil\n\t}\n",
		pkg:  "replayer", test: "TestNothingCompletedBeforeThePageIsSent",
	},
	{
		name: "fence-without-spools", breaks: "an outcome in the spool of an ingress that is down is not waited for",
		file: "replayer/fence.go",
		old:  "\t\tp.spools = len(found) == 0\n",
		new:  "\t\tp.spools, found = true, nil\n",
		pkg:  "replayer", test: "TestTheFenceWaitsForEveryIngress",
	},
	{
		name: "fence-trusts-a-floor-beyond-the-end", breaks: "after a rollback completions pass as committed that are not",
		file: "replayer/fence.go",
		old:  "\tcase floor > last:\n",
		new:  "\tcase floor > last && p.last == 1<<62:\n",
		pkg:  "replayer", test: "TestTheFenceAfterARollback",
	},
	{
		name: "sent-under-a-short-lease", breaks: "a request is still on its way when another replay sends it",
		file: "replayer/send.go",
		old:  "\tif deadline.After(expires) {\n",
		new:  "\tif deadline.After(expires.Add(time.Hour)) {\n",
		pkg:  "replayer", test: "TestNothingIsSentUnderALeaseThatIsTooShort",
	},
	{
		name: "fence-never-too-old", breaks: "requests are sent on behind a fence of long ago",
		file: "replayer/pass.go",
		old:  "\tif !p.passed && p.since(p.fenced) >= fenceAge {\n",
		new:  "\tif !p.passed && p.since(p.fenced) >= time.Hour {\n",
		pkg:  "replayer", test: "TestAPageThatGrowsTooOldIsCut",
	},
	// The whole: the check of all records must fail too when something is lost.
	{
		name: "chaos-nothing-published-after-a-start", breaks: "what was in the spool at a crash stays there",
		file: "ingress/publisher.go",
		old:  "\treader := p.spool.NewReader()\n\tfor {\n",
		new:  "\treader := p.spool.NewReader()\n\tfor {\n\t\tif rec, ok, err := reader.TryNext(); err == nil && ok && rec.Position.Start != p.spool.Start() {\n\t\t\tp.spool.Release(rec.Position.Start, spool.Range{First: rec.Position.Index, Last: rec.Position.Index})\n\t\t\tcontinue\n\t\t} else if ok {\n\t\t\treader.Rewind(rec.Position)\n\t\t}\n",
		pkg:  "e2e/chaos", test: "TestKillEveryProcess/distributed/response",
	},
	{
		name: "outcome-queued-not-written", breaks: "an ingress that is killed after the answer makes a repeat",
		file: "ingress/handler.go",
		old:  "\tif _, err := t.res.AppendWritten(t.b.record); err != nil {\n\t\tt.h.m.lostOutcomes",
		new:  "\tif _, err := t.res.Append(t.b.record); err != nil {\n\t\tt.h.m.lostOutcomes",
		pkg:  "ingress", test: "TestOutcomeIsWrittenWhileAnFsyncRuns",
	},
}
