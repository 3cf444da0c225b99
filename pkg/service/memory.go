package service

import (
	"os"
	"runtime/debug"
)

const (
	// gcPercent lets the heap grow to four times what is alive before it is
	// collected: a service's live heap is some ten MiB, and collecting it less
	// often saves a tenth of the CPU.
	gcPercent = 300
	// memoryLimit makes the collector work harder above it, so that a burst of
	// large bodies does not grow the process to four times what they take.
	memoryLimit = 224 << 20
)

// tuneMemory sets the collector, unless GOGC or GOMEMLIMIT say otherwise: those
// who know the size of their container, or serve tens of thousands of
// connections, set GOMEMLIMIT.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}
