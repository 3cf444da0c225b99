// Command replayer sends captured requests to the API again. See replayer --help.
package main

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/holdfast-io/holdfast/replayer"
)

func main() { os.Exit(run()) }

func run() int {
	// Two: the first asks the run to stop, the second cuts what is in flight.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	return replayer.Main(replayer.Process{
		Args: os.Args[1:], Stdout: os.Stdout, Stderr: os.Stderr, Signals: signals,
	})
}
