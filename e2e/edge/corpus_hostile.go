package edge

import (
	"fmt"
	"strings"
)

// hidden is a chunked body of nothing, and behind it, for those who go by a
// length, a second request.
var hidden = "0\r\n\r\n" + another

// both gives the same attack on a captured request and on one whose body is
// streamed: the two are read by different code.
func both(name, status string, fields []string, rest string) []Case {
	return []Case{
		refused(name, status, head("POST /x HTTP/1.1", fields...)+rest),
		refused(name+", not captured", status, head("REPORT /x HTTP/1.1", fields...)+rest),
	}
}

// differs gives both cases of an attack the reason of nginx's.
func differs(cases []Case, reason string) []Case {
	for i := range cases {
		cases[i].Nginx = reason
	}
	return cases
}

func join(lists ...[]Case) (all []Case) {
	for _, list := range lists {
		all = append(all, list...)
	}
	return all
}

// Why nginx takes what the ingress refuses.
const (
	lineFeeds = "nginx takes a bare LF for a line's end, as RFC 9112 section 2.2 allows; smuggling lives on that"
	controls  = "nginx passes control bytes; RFC 9110 section 5.5 calls them dangerous"
	ignores   = "nginx drops fields whose names it does not like, and goes on"
	skips     = "nginx skips extensions and trailers unread; the ingress passes trailers on, and must understand them"
	lenient   = "nginx is lenient; nobody sends this who means well"
	anyHost   = "nginx does not look into Host; RFC 9112 section 3.2 demands 400"
)

func lengths() []Case {
	length := func(name, status, value string) []Case {
		return both(name, status, []string{"Content-Length:" + value}, "hello"+another)
	}
	return join(
		both("CL.TE", "400", []string{"Content-Length: 6", "Transfer-Encoding: chunked"}, hidden),
		both("TE.CL", "400", []string{"Transfer-Encoding: chunked", "Content-Length: 4"}, "5c\r\n"+another+"\r\n0\r\n\r\n"),
		both("TE.CL, length 0", "400", []string{"Transfer-Encoding: chunked", "Content-Length: 0"}, hidden),
		both("two lengths", "400", []string{"Content-Length: 5", "Content-Length: 0"}, "hello"+another),
		both("two equal lengths", "400", []string{"Content-Length: 5", "Content-Length: 5"}, "hello"),
		both("two lengths, spelled differently", "400", []string{"Content-Length: 5", "content-length: 6"}, "hello"+another),
		length("list", "400", " 5, 5"),
		length("list of different", "400", " 5, 6"),
		length("list with an empty member", "400", " ,5"),
		length("plus", "400", " +5"),
		length("minus", "400", " -5"),
		length("minus zero", "400", " -0"),
		length("hex", "400", " 0x5"),
		length("letters", "400", " five"),
		length("digits and letters", "400", " 5a"),
		length("space inside", "400", " 5 5"),
		length("fraction", "400", " 5.0"),
		length("exponent", "400", " 1e1"),
		length("underscore", "400", " 1_0"),
		length("quoted", "400", ` "5"`),
		length("empty", "400", ""),
		length("blank", "400", "  "),
		length("full-width digit", "400", " \xef\xbc\x95"),
		length("NUL", "400", " 5\x00"),
		length("vertical tab", "400", " \x0b5"),
		length("2^63", "400|413", " 9223372036854775808"),
		length("2^64", "400|413", " 18446744073709551616"),
		length("2^64 + 5", "400|413", " 18446744073709551621"),
		length("forty digits", "400|413", " "+strings.Repeat("9", 40)),
		both("space before the colon", "400", []string{"Content-Length : 5"}, "hello"+another),
		[]Case{
			passes("white space around", head("POST /x HTTP/1.1", "Content-Length: \t 5 \t")+"hello").nginx("nginx trims spaces, not tabs"),
			passes("underscore in the name", head("POST /x HTTP/1.1", "Content_Length: 5", "Content-Length: 5")+"hello"),
			passes("forty digits, most of them zeros", head("POST /x HTTP/1.1", "Content-Length: "+strings.Repeat("0", 39)+"5")+"hello").want("200 keep"),
		},
	)
}

func codings() []Case {
	coding := func(name, status, field string) []Case {
		return join(
			both(name, status, []string{field}, hidden),
			both(name+", and a length", "400|501", []string{"Content-Length: 6", field}, hidden),
		)
	}
	return join(
		coding("xchunked", "501", "Transfer-Encoding: xchunked"),
		coding("identity", "501", "Transfer-Encoding: identity"),
		coding("gzip", "501", "Transfer-Encoding: gzip"),
		coding("gzip, chunked", "400|501", "Transfer-Encoding: gzip, chunked"),
		coding("chunked, identity", "400|501", "Transfer-Encoding: chunked, identity"),
		coding("chunked twice in a list", "400", "Transfer-Encoding: chunked, chunked"),
		coding("list with an empty member", "400|501", "Transfer-Encoding: , chunked"),
		coding("parameter", "400|501", "Transfer-Encoding: chunked;q=1"),
		coding("quoted", "400|501", `Transfer-Encoding: "chunked"`),
		coding("colon", "400|501", "Transfer-Encoding: :chunked"),
		coding("empty", "400|501", "Transfer-Encoding:"),
		coding("vertical tab after", "400", "Transfer-Encoding: chunked\x0b"),
		coding("vertical tab before", "400", "Transfer-Encoding: \x0bchunked"),
		coding("form feed", "400", "Transfer-Encoding: chunked\x0c"),
		coding("NUL after", "400", "Transfer-Encoding: chunked\x00"),
		differs(coding("bare CR after", "400", "Transfer-Encoding: chunked\r")[:2], controls), coding("bare CR after", "400", "Transfer-Encoding: chunked\r")[2:],
		coding("no-break space", "400|501", "Transfer-Encoding: chunked\xa0"),
		coding("k that is another letter", "400|501", "Transfer-Encoding: chun\xe2\x84\xaaed"),
		coding("folded", "400", "Transfer-Encoding:\r\n chunked"),
		coding("folded with a tab", "400", "Transfer-Encoding:\r\n\tchunked"),
		coding("space before the colon", "400", "Transfer-Encoding : chunked"),
		coding("tab before the colon", "400", "Transfer-Encoding\t: chunked"),
		coding("leading space", "400", " Transfer-Encoding: chunked"),
		differs(coding("behind a bare LF", "400", "X-A: 1\nTransfer-Encoding: chunked")[:2], lineFeeds), coding("behind a bare LF", "400", "X-A: 1\nTransfer-Encoding: chunked")[2:],
		coding("behind a bare CR", "400", "X-A: 1\rTransfer-Encoding: chunked"),
		coding("name with NUL", "400", "Transfer-Encoding\x00: chunked"),
		coding("two fields, equal", "400", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
		coding("two fields, the first unknown", "400|501", "Transfer-Encoding: x\r\nTransfer-Encoding: chunked"),
		coding("two fields, the last unknown", "400|501", "Transfer-Encoding: chunked\r\ntransfer-encoding: identity"),
		[]Case{
			refused("HTTP/1.0", "400", head("POST /x HTTP/1.0", "Transfer-Encoding: chunked")+hidden),
			refused("HTTP/1.0, kept alive", "400", head("POST /x HTTP/1.0", "Connection: keep-alive", "Transfer-Encoding: chunked")+hidden),
			refused("HTTP/1.0, and a length", "400", head("POST /x HTTP/1.0", "Content-Length: 6", "Transfer-Encoding: chunked")+hidden),
			refused("HTTP/1.0, not captured", "400", head("GET /x HTTP/1.0", "Transfer-Encoding: chunked")+hidden),
			passes("underscore in the name", head("POST /x HTTP/1.1", "Transfer_Encoding: chunked", fmt.Sprintf("Content-Length: %d", len(hidden)))+hidden),
			passes("another name", head("POST /x HTTP/1.1", "X-Transfer-Encoding: chunked", fmt.Sprintf("Content-Length: %d", len(hidden)))+hidden),
		},
	)
}

func chunkAttacks() []Case {
	body := func(name, status, wire string) []Case {
		return both(name, status, []string{"Transfer-Encoding: chunked"}, wire)
	}
	end := "\r\nhello\r\n0\r\n\r\n" + another
	// It may be refused at once, or when no more comes of it.
	huge := body("2^63 - 1", "400|413", "7FFFFFFFFFFFFFFF"+end)
	for i := range huge {
		huge[i].HalfClose, huge[i].Want = true, "?400|413 close"
	}
	return join(
		body("plus", "400", "+5"+end),
		body("minus", "400", "-5"+end),
		body("0x", "400", "0x5"+end),
		body("space before", "400", " 5"+end),
		differs(body("space after", "400", "5 "+end), lenient),
		differs(body("tab after", "400", "5\t"+end), lenient),
		body("empty size", "400", end),
		body("extension without a size", "400", ";a=b"+end),
		body("not hex", "400", "g"+end),
		body("hex, then not", "400", "5g"+end),
		body("underscore", "400", "0_5"+end),
		body("comma", "400", "5,5"+end),
		body("NUL", "400", "5\x00"+end),
		differs(body("17 digits", "400|413", "00000000000000005"+end), lenient),
		body("2^64 - 1", "400|413", "FFFFFFFFFFFFFFFF"+end),
		huge,
		body("2^64 + 5", "400|413", "10000000000000005"+end),
		differs(body("bare LF after the size", "400", "5\nhello\r\n0\r\n\r\n"+another), lineFeeds),
		body("bare CR after the size", "400", "5\rhello\r\n0\r\n\r\n"+another),
		differs(body("bare LF after the data", "400", "5\r\nhello\n0\r\n\r\n"+another), lineFeeds),
		body("bare CR after the data", "400", "5\r\nhello\r0\r\n\r\n"+another),
		body("nothing after the data", "400", "5\r\nhello0\r\n\r\n"+another),
		body("more data than said", "400", "5\r\nhello!\r\n0\r\n\r\n"+another),
		differs(body("less data than said", "400", "6\r\nhello\r\n0\r\n\r\n"+another), lineFeeds),
		differs(body("bare LF in the last line", "400", "5\r\nhello\r\n0\n\r\n"+another), lineFeeds),
		differs(body("bare LF for the end", "400", "5\r\nhello\r\n0\r\n\n"+another), lineFeeds),
		body("LF in an extension", "400", "5;a\nb"+end),
		body("CR in an extension", "400", "5;a\rb"+end),
		differs(body("NUL in an extension", "400", "5;a\x00b"+end), skips),
		differs(body("control byte in an extension", "400", "5;a=\"\x01\""+end), skips),
		body("LF hides a chunk", "400", "2;\nxx\r\n5c\r\n0\r\n\r\n"+another),
		differs(body("extension of 64 KiB", "400|413|431", "5;"+strings.Repeat("e", 64<<10)+end), skips),
		differs(body("trailer with a space before the colon", "400", "0\r\nX-A : 1\r\n\r\n"+another), skips),
		differs(body("trailer without a colon", "400", "0\r\nX-A\r\n\r\n"+another), skips),
		differs(body("trailer without a name", "400", "0\r\n: 1\r\n\r\n"+another), skips),
		differs(body("trailer with a bare LF", "400", "0\r\nX-A: 1\n\r\n"+another), skips),
		body("trailer with a bare CR", "400", "0\r\nX-A: 1\rX-B: 2\r\n\r\n"+another),
		differs(body("trailer with NUL", "400", "0\r\nX-A: 1\x00\r\n\r\n"+another), skips),
		differs(body("folded trailer", "400", "0\r\nX-A: 1\r\n 2\r\n\r\n"+another), skips),
		differs(body("trailer that is a request", "400", "0\r\n"+another), skips),
		differs(body("200 trailers", "400|413|431", "0\r\n"+strings.Repeat("X-A: 1\r\n", 200)+"\r\n"), skips),
		differs(body("trailers of 128 KiB", "400|413|431", "0\r\nX-A: "+strings.Repeat("t", 128<<10)+"\r\n\r\n"), skips),
	)
}

func fieldAttacks() []Case {
	field := func(name, lines string) []Case {
		return []Case{
			refused(name, "400", raw("GET /f HTTP/1.1", "Host: api.test", lines)+another),
			refused(name+", captured", "400", raw("POST /f HTTP/1.1", "Host: api.test", "Content-Length: 0", lines)+another),
		}
	}
	return join(
		differs(field("bare LF between", "X-A: 1\nX-B: 2"), lineFeeds),
		differs(field("bare LF ends the head", "X-A: 1\n\nGET /smuggled HTTP/1.1\r\nHost: api.test"), lineFeeds),
		field("bare CR in a value", "X-A: 1\r2"),
		field("bare CR between", "X-A: 1\rX-B: 2"),
		differs(field("CR before CRLF", "X-A: 1\r"), controls),
		field("bare CR ends the head", "X-A: 1\r\rGET /smuggled HTTP/1.1"),
		field("NUL in a value", "X-A: 1\x002"),
		field("NUL in a name", "X-\x00A: 1"),
		differs(field("control byte in a value", "X-A: \x01"), controls),
		differs(field("escape in a value", "X-A: \x1b[0m"), controls),
		differs(field("DEL in a value", "X-A: \x7f"), controls),
		field("folded with a space", "X-A: 1\r\n 2"),
		field("folded with a tab", "X-A: 1\r\n\t2"),
		field("folded, empty", "X-A: 1\r\n "),
		field("space before the colon", "X-A : 1"),
		field("tab before the colon", "X-A\t: 1"),
		differs(field("no colon", "X-A"), ignores),
		field("no name", ": 1"),
		field("space in a name", "X A: 1"),
		differs(field("slash in a name", "X/A: 1"), ignores),
		differs(field("brackets in a name", "X[A]: 1"), ignores),
		differs(field("at in a name", "@A: 1"), ignores),
		differs(field("quotes in a name", "\"X\": 1"), ignores),
		differs(field("Latin 1 in a name", "X-\xe9: 1"), ignores),
		differs(field("UTF-8 in a name", "X-\xc3\xa9: 1"), ignores),
		[]Case{
			refused("space before the first", "400", raw("GET /f HTTP/1.1", " Host: api.test")+another),
			refused("tab before the first", "400", raw("GET /f HTTP/1.1", "\tX-A: 1", "Host: api.test")+another),
			refused("line of white space first", "400", raw("GET /f HTTP/1.1", " ", "Host: api.test")+another),
			refused("only line feeds", "400", "GET /f HTTP/1.1\nHost: api.test\n\n").nginx(lineFeeds),
			refused("bare LF after the request line", "400", "GET /f HTTP/1.1\nHost: api.test\r\n\r\n").nginx(lineFeeds),
			refused("bare LF at the very end", "400", "GET /f HTTP/1.1\r\nHost: api.test\r\n\n"+another).nginx(lineFeeds),
		},
	)
}

func hosts() (cases []Case) {
	host := func(name, value string) Case { return passes(name, raw("GET /h HTTP/1.1", "Host:"+value)) }
	bad := func(name, value string) Case { return refused(name, "400", raw("GET /h HTTP/1.1", "Host:"+value)) }
	return append(cases,
		host("port", " api.test:8080"),
		host("empty port", " api.test:"),
		host("upper case", " API.test"),
		host("underscore", " exa_mple.test"),
		host("address", " 192.0.2.1:80"),
		host("IPv6", " [2001:db8::1]"),
		host("IPv6 and port", " [2001:db8::1]:80"),
		host("trailing dot", " api.test."),
		host("no space", "api.test"),
		host("white space around", "\t api.test \t").nginx("nginx trims spaces, not tabs"),
		host("empty", "").nginx("nginx refuses it; a target without authority has an empty Host (RFC 9112 section 3.2)"),
		refused("none", "400", raw("GET /h HTTP/1.1", "X-A: 1")),
		refused("no field at all", "400", raw("GET /h HTTP/1.1")),
		refused("two", "400", raw("GET /h HTTP/1.1", "Host: api.test", "Host: other.test")),
		refused("two equal", "400", raw("GET /h HTTP/1.1", "Host: api.test", "Host: api.test")),
		refused("two, spelled differently", "400", raw("GET /h HTTP/1.1", "Host: api.test", "hOST: other.test")),
		refused("two, the first empty", "400", raw("GET /h HTTP/1.1", "Host:", "Host: api.test")),
		refused("only with a space before the colon", "400", raw("GET /h HTTP/1.1", "Host : api.test")),
		bad("space inside", " api.test other.test"),
		bad("tab inside", " api.test\tother.test"),
		bad("comma", " api.test,other.test").nginx(anyHost),
		bad("slash", " api.test/a"),
		bad("backslash", ` api.test\a`).nginx(anyHost),
		bad("question mark", " api.test?a").nginx(anyHost),
		bad("fragment", " api.test#a").nginx(anyHost),
		bad("user", " user@api.test").nginx(anyHost),
		bad("scheme", " http://api.test"),
		bad("letters for a port", " api.test:http").nginx(anyHost),
		bad("two ports", " api.test:80:80").nginx(anyHost),
		bad("open bracket", " [::1").nginx(anyHost),
		bad("after the bracket", " [::1]x").nginx(anyHost),
		bad("quote", ` "api.test"`).nginx(anyHost),
		bad("angles", " <api.test>").nginx(anyHost),
		bad("NUL", " api.test\x00.other"),
		bad("Latin 1", " caf\xe9.test").nginx(anyHost),
		bad("encoded slash, cut", " api.test%2").nginx(anyHost),
	)
}

func requestLines() (cases []Case) {
	line := func(name, status, start string) Case { return refused(name, status, head(start)+another) }
	return append(cases,
		line("two spaces after the method", "400", "GET  /r HTTP/1.1").nginx(lenient),
		line("two spaces before the version", "400", "GET /r  HTTP/1.1").nginx(lenient),
		line("tab after the method", "400", "GET\t/r HTTP/1.1"),
		line("tab before the version", "400", "GET /r\tHTTP/1.1"),
		line("space at the end", "400", "GET /r HTTP/1.1 ").nginx(lenient),
		line("tab at the end", "400", "GET /r HTTP/1.1\t"),
		line("CR at the end", "400", "GET /r HTTP/1.1\r"),
		line("space in the target", "400", "GET /r /s HTTP/1.1"),
		line("space before the method", "400", " GET /r HTTP/1.1"),
		line("no target", "400", "GET HTTP/1.1"),
		line("no method", "400", "/r HTTP/1.1"),
		line("only a version", "400", "HTTP/1.1"),
		line("colon after the method", "400", "GET: /r HTTP/1.1"),
		line("lower case version", "400", "GET /r http/1.1"),
		line("version without a dot", "400", "GET /r HTTP/1"),
		line("version with a comma", "400", "GET /r HTTP/1,1"),
		line("version with two digits", "400", "GET /r HTTP/1.10").nginx(lenient),
		line("version with leading zero", "400|505", "GET /r HTTP/01.1"),
		line("version with a sign", "400|505", "GET /r HTTP/+1.1"),
		line("version of another protocol", "400", "GET /r HTTPS/1.1"),
		line("ICY", "400", "GET /r ICY/1.1"),
		line("version of full-width digits", "400", "GET /r HTTP/\xef\xbc\x91.1"),
		line("HTTP/2.0", "505", "GET /r HTTP/2.0"),
		line("HTTP/3.0", "505", "GET /r HTTP/3.0"),
		line("HTTP/0.9 with a version", "505", "GET /r HTTP/0.9"),
		line("NUL in the method", "400", "G\x00ET /r HTTP/1.1"),
		line("NUL in the version", "400", "GET /r HTTP/1.1\x00"),
		line("an answer", "400", "HTTP/1.1 200 OK"),
		refused("HTTP/0.9", "400", "GET /r\r\n\r\n").nginx("nginx still serves HTTP/0.9"),
		Case{Name: "HTTP/0.9, bare LF", Send: "GET /r\n", HalfClose: true, Want: "?400 close"}.nginx("nginx still serves HTTP/0.9"),
		refused("HTTP/2 preface", "505", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
		refused("three empty lines before", "400", "\r\n\r\n\r\n"+head("GET /r HTTP/1.1")).nginx("nginx skips any number of line ends"),
		refused("bare LF before", "400", "\n"+head("GET /r HTTP/1.1")).nginx("nginx skips any number of line ends"),
		refused("space and empty line before", "400", " \r\n"+head("GET /r HTTP/1.1")),
		refused("garbage", "400", "\x00\x01\x02\xff\xfe garbage \r\n\r\n"),
		refused("PROXY protocol", "400", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"+head("GET /r HTTP/1.1")),
		Case{Name: "SMTP", Send: "EHLO client.test\r\nMAIL FROM:<a@b.test>\r\n", HalfClose: true, Want: "?400 close"},
		Case{Name: "Redis", Send: "*1\r\n$4\r\nPING\r\n", HalfClose: true, Want: "?400 close"},
		Case{Name: "TLS", Send: "\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + strings.Repeat("\x5a", 100), HalfClose: true, Want: "?400 close"},
	)
}

func limits() []Case {
	fields := func(n int) (list []string) {
		for i := range n {
			list = append(list, fmt.Sprintf("X-%d: 1", i))
		}
		return list
	}
	const ours = "nginx limits bytes, not fields, and we gave it room for more"
	return []Case{
		passes("128 fields", head("GET /l HTTP/1.1", fields(127)...)),
		refused("129 fields", "431", head("GET /l HTTP/1.1", fields(128)...)).nginx(ours),
		refused("129 fields, captured", "431", sized("POST /l HTTP/1.1", "x", fields(127)...)).nginx(ours),
		refused("10,000 fields", "431", head("GET /l HTTP/1.1", fields(10_000)...)),
		refused("field of 65 KiB", "431", head("GET /l HTTP/1.1", "X-Long: "+strings.Repeat("v", 65<<10))),
		refused("field of 1 MiB", "431", head("GET /l HTTP/1.1", "X-Long: "+strings.Repeat("v", 1<<20))),
		refused("name of 65 KiB", "431", head("GET /l HTTP/1.1", strings.Repeat("n", 65<<10)+": v")),
		refused("target of 65 KiB", "414|431", head("GET /"+strings.Repeat("a", 65<<10)+" HTTP/1.1")),
		refused("method of 65 KiB", "400|414|431|501", head(strings.Repeat("M", 65<<10)+" /l HTTP/1.1")),
		refused("65 KiB in many fields", "431", head("GET /l HTTP/1.1", strings.TrimSuffix(strings.Repeat("X-Long: "+strings.Repeat("v", 1<<10)+"\r\n", 65), "\r\n"))).nginx(ours),
		refused("line without an end", "400|431", strings.Repeat("A", 128<<10)),
		refused("body too large", "413", head("POST /l HTTP/1.1", "Content-Length: 1073741824")+"hello"),
		Case{Name: "chunk too large", Send: chunked("POST /l HTTP/1.1", "40000000\r\nhello"), HalfClose: true, Want: "?400|413 close"},
	}
}

func cuts() (cases []Case) {
	cut := func(name, send string) Case {
		return Case{Name: name, Send: send, HalfClose: true, Want: "?400|408|499 close"}
	}
	return append(cases,
		Case{Name: "nothing", HalfClose: true, Want: "close"},
		Case{Name: "an empty line", Send: "\r\n", HalfClose: true, Want: "?400 close"},
		cut("request line", "GET /c"),
		cut("head", "GET /c HTTP/1.1\r\nHost: api.test\r\n"),
		cut("head, before its last byte", "GET /c HTTP/1.1\r\nHost: api.test\r\n\r"),
		cut("body, captured", head("POST /c HTTP/1.1", "Content-Length: 10")+"hello"),
		cut("body, streamed", head("REPORT /c HTTP/1.1", "Content-Length: 10")+"hello"),
		cut("chunked body, captured", chunked("POST /c HTTP/1.1", "5\r\nhel")),
		cut("chunked body, streamed", chunked("REPORT /c HTTP/1.1", "5\r\nhel")),
		cut("chunked body, between chunks", chunked("POST /c HTTP/1.1", "5\r\nhello\r\n")),
		cut("chunked body, before the last line", chunked("POST /c HTTP/1.1", "5\r\nhello\r\n0\r\n")),
		cut("chunked body, streamed, before the last line", chunked("REPORT /c HTTP/1.1", "5\r\nhello\r\n0\r\n")),
		cut("trailers", chunked("POST /c HTTP/1.1", "5\r\nhello\r\n0\r\nX-A: 1\r\n")),
		Case{Name: "the second of two", Send: head("GET /c HTTP/1.1") + "GET /c", Want: "200 any"},
	)
}
