// Package chaos holds tests that kill Holdfast's processes, the API and
// replayers with SIGKILL at random moments under load, and then compare what
// clients were told, what the API stored and what the ledger says.
//
// The moments are counted in requests and come from a seed, which is printed.
// CHAOS_SEED=n runs the schedule of that seed again; what the machine makes of
// it differs each time. -chaos.duration=1h -timeout=2h goes on with one seed
// after the other for an hour; -chaos.keep=DIR keeps the data and logs of what
// failed.
package chaos
