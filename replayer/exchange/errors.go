package exchange

import "fmt"

// ItemError says why one item of a file is not taken. The items after it can
// still be read.
type ItemError struct {
	Number int // in the file, from 1
	Reason string
}

// Error names the item and the reason.
func (e *ItemError) Error() string { return fmt.Sprintf("item %d: %s", e.Number, e.Reason) }
