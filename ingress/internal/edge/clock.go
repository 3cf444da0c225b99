package edge

import (
	"net/http"
	"sync/atomic"
	"time"
)

// clock gives the Date of answers, made once a second.
type clock struct{ now atomic.Pointer[date] }

type date struct {
	second int64
	line   string
}

// appendDate appends the field line (RFC 9110 section 6.6.1).
func (c *clock) appendDate(dst []byte) []byte {
	now := time.Now()
	d := c.now.Load()
	if d == nil || d.second != now.Unix() {
		d = &date{now.Unix(), "Date: " + now.UTC().Format(http.TimeFormat) + "\r\n"}
		c.now.Store(d)
	}
	return append(dst, d.line...)
}
