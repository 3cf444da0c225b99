package acker

import "github.com/holdfast-io/holdfast/pkg/service"

// Settings are the acker's.
type Settings struct {
	service.Common
	service.NATS
	service.Streams
	service.Ledger
	service.API
	service.Acker
}

// Validate refuses an open API off loopback.
func (s Settings) Validate() []service.SettingError {
	return service.RequireAuth("ACKER_ADDR", s.AckerAddr, s.API)
}
