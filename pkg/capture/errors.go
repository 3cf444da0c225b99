package capture

import "errors"

// ErrMalformed is wrapped by every error about a message that does not have
// the form this package documents. No retry makes it better: set it aside.
var ErrMalformed = errors.New("malformed message")

// ErrNewerVersion is wrapped by errors about a message whose form is newer
// than this program knows.
var ErrNewerVersion = errors.New("message of a newer version")
