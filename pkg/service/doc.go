// Package service holds what the main function of every Holdfast binary
// shares: settings from the environment, run and ordered shutdown, the ops
// listener, logging, version, and problem details for the project's own APIs.
//
// A binary's main is one line, os.Exit(service.Main(app)). Main is the only
// place that handles signals. Everything else in the package works on what it
// is given, so that a test can build a service in process on ":0" listeners,
// and so that standalone can build all services on one registry, one readiness
// and one logger.
package service
