package service

import (
	"runtime/debug"
)

// version is set by the linker in a release:
// -ldflags "-X github.com/holdfast-io/holdfast/pkg/service.version=v1.2.3".
var version string

// Version gives the version of the binary: what the linker was told, or else
// what the build recorded, or else "devel".
func Version() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	return builtVersion(info)
}

func builtVersion(info *debug.BuildInfo) string {
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	built := "devel"
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			built += "-" + s.Value[:min(len(s.Value), 12)]
		case s.Key == "vcs.modified" && s.Value == "true":
			built += "-dirty"
		}
	}
	return built
}
