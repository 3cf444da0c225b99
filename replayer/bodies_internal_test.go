package replayer

import (
	"bytes"
	"compress/gzip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

func TestJSONPathsAreReadAndWritten(t *testing.T) {
	for text, want := range map[string]string{
		"$.a.b": "", "$.list[*].id": "", "$.*": "$[*]", "$[0].x": "", "$['a b']": "", `$["a.b"]`: "$['a.b']", `$['it\'s']`: "", `$['\\']`: "", "$['*']": "",
		"$.grün": "", "$['']": "", "$.a['b']": "$.a.b",
	} {
		p, err := ParseJSONPath(text)
		require.NoError(t, err, text)
		if want == "" {
			want = text
		}
		require.Equal(t, want, p.String())
		again, err := ParseJSONPath(p.String())
		require.NoError(t, err)
		require.Equal(t, p, again)
	}
	for _, text := range []string{"", "$", "a", ".a", "$a", "$.", "$..a", "$[", "$[]", "$[-1]", "$[x]", "$['a]", "$['a'x]", "$[0", "$.a.", "$[?(@.a)]"} {
		_, err := ParseJSONPath(text)
		require.Error(t, err, text)
	}
}

func FuzzJSONPath(f *testing.F) {
	for _, seed := range []string{"$.a[0]['b\\'c'].*", "$[*]", "$"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParseJSONPath(text)
		if err != nil {
			return
		}
		again, err := ParseJSONPath(p.String())
		require.NoError(t, err, "%s", p)
		require.Equal(t, p, again)
		require.True(t, p.names(p))
	})
}

func jsonOf(body string) *capture.Answer {
	return &capture.Answer{Type: "application/json; charset=utf-8", Body: []byte(body)}
}

func paths(t *testing.T, texts ...string) (list []JSONPath) {
	t.Helper()
	for _, text := range texts {
		p, err := ParseJSONPath(text)
		require.NoError(t, err)
		list = append(list, p)
	}
	return list
}

func TestJSONIsComparedByValue(t *testing.T) {
	const stored = `{"id":"1","n":1.0,"list":[{"id":1,"v":"a"},{"id":2,"v":"b"}],"none":null,"a b":true}`
	for test, want := range map[string][]Difference{
		" {\"a b\":true, \"none\" : null,\n\"list\":[{\"v\":\"\\u0061\",\"id\":1e0},{\"id\":2,\"v\":\"b\"}],\"n\":1,\"id\":\"1\"}": nil,
		strings.Replace(stored, `"n":1.0`, `"n":2`, 1):          {{Path: "$.n", Stored: "1.0", Test: "2"}},
		strings.Replace(stored, `"n":1.0`, `"n":"1.0"`, 1):      {{Path: "$.n", Stored: "1.0", Test: `"1.0"`}},
		strings.Replace(stored, `"none":null,`, ``, 1):          {{Path: "$.none", Stored: "null"}},
		strings.Replace(stored, `{"id":2,"v":"b"}`, `7`, 1):     {{Path: "$.list[1]", Stored: `{"id":2,"v":"b"}`, Test: "7"}},
		strings.Replace(stored, `,{"id":2,"v":"b"}`, ``, 1):     {{Path: "$.list[1]", Stored: `{"id":2,"v":"b"}`}},
		strings.Replace(stored, `"a b":true`, `"a b":false`, 1): {{Path: "$['a b']", Stored: "true", Test: "false"}},
		strings.Replace(stored, `"id":1,`, `"id":9,`, 1):        {{Path: "$.list[0].id", Stored: "1", Test: "9"}},
		`[]`:                {{Path: "$", Stored: stored[:0] + shown(mustJSON(t, stored)), Test: "[]"}},
		`{"id":"1"} trails`: {{Path: "byte 9", Stored: printable(stored[9:]), Test: "} trails"}},
	} {
		require.Equal(t, want, differences(jsonOf(stored), jsonOf(test), nil), test)
	}
	changed := strings.NewReplacer(`"id":1,`, `"id":9,`, `"id":2,`, `"id":8,`, `"id":"1"`, `"id":"x"`).Replace(stored)
	require.Len(t, differences(jsonOf(stored), jsonOf(changed), nil), 3)
	require.Empty(t, differences(jsonOf(stored), jsonOf(changed), paths(t, "$.list[*].id", "$.id")))
	require.Len(t, differences(jsonOf(stored), jsonOf(changed), paths(t, "$.list[1].id", "$.id")), 1)
	require.Empty(t, differences(jsonOf(stored), jsonOf(strings.Replace(stored, `"id":"1",`, "", 1)), paths(t, "$.id")), "what is ignored may be away")
	require.Len(t, differences(jsonOf(`[1,2,3,4,5,6,7,8]`), jsonOf(`[]`), nil), maxDifferences)
	long := differences(jsonOf(`"`+strings.Repeat("ä", 500)+`"`), jsonOf(`1`), nil)
	require.Less(t, len(long[0].Stored), 130)
}

func mustJSON(t *testing.T, text string) any {
	t.Helper()
	v, err := parseJSON([]byte(text))
	require.NoError(t, err)
	return v
}

func TestNumbersWithAbsurdExponentsCostNothing(t *testing.T) {
	require.True(t, sameNumber("1e999999999", "1e999999999"))
	require.False(t, sameNumber("1e999999999", "10e999999998"))
	require.True(t, sameNumber("100", "1E2"))
	require.True(t, sameNumber("-0.5", "-5e-1"))
	require.False(t, sameNumber("9007199254740993", "9007199254740992"))
}

func TestOtherBodiesAreComparedByBytes(t *testing.T) {
	text := func(body string) *capture.Answer { return &capture.Answer{Type: "text/plain", Body: []byte(body)} }
	require.Empty(t, differences(text("a\x00b"), text("a\x00b"), nil))
	require.Equal(t, []Difference{{Path: "byte 1", Stored: "%00b", Test: "%FFb"}}, differences(text("a\x00b"), text("a\xffb"), nil))
	require.Equal(t, []Difference{{Path: "byte 3", Test: "!"}}, differences(text("abc"), text("abc!"), nil))
	require.Len(t, differences(text(`{"a":1}`), text(`{"a": 1}`), nil), 1)

	packed := func(body string, level int) *capture.Answer {
		var buf bytes.Buffer
		w, err := gzip.NewWriterLevel(&buf, level)
		require.NoError(t, err)
		_, err = w.Write([]byte(body))
		require.NoError(t, err)
		require.NoError(t, w.Close())
		a := jsonOf("")
		a.Encoding, a.Body = "GZIP", buf.Bytes()
		return a
	}
	require.Empty(t, differences(packed(`{"a":1}`, 9), packed(`{"a": 1.0}`, 0), nil))
	require.Empty(t, differences(packed(`{"a":1}`, 9), jsonOf(`{"a":1}`), nil))
	require.Len(t, differences(packed(`{"a":1}`, 9), jsonOf(`{"a":2}`), nil), 1)
	bomb := packed(strings.Repeat(" ", maxDecoded+1), 9)
	require.Len(t, decoded(bomb), len(bomb.Body))
}

func TestPartsOfBodies(t *testing.T) {
	part := func(contentType, body string, cut bool) *capture.Answer {
		return &capture.Answer{Type: contentType, Body: []byte(body), Cut: cut}
	}
	require.False(t, partDiffers(part("", "ab", true), part("", "abc", false)))
	require.True(t, partDiffers(part("", "ab", true), part("", "aXc", false)))
	require.True(t, partDiffers(part("", "ab", true), part("", "a", false)), "what is kept is more than there is")
	require.True(t, partDiffers(part("", "ab", false), part("", "abc", true)))
	require.False(t, partDiffers(part("application/json", `{"a":1,`, true), part("application/json", `{"b":2,"a":1}`, false)), "a part of JSON says nothing")
}
