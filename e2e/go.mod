module github.com/holdfast-io/holdfast/e2e

go 1.26.0

require (
	github.com/holdfast-io/holdfast/pkg/completion v0.0.0
	github.com/stretchr/testify v1.12.1
	go.uber.org/goleak v1.3.0
	modernc.org/sqlite v1.61.1
)

require go.yaml.in/yaml/v3 v3.0.5 // indirect

require (
	github.com/dustin/go-humanize v1.1.0 // indirect
	github.com/google/uuid v1.6.0 // indirect
	github.com/holdfast-io/holdfast/pkg v0.0.0
	github.com/mattn/go-isatty v0.0.24 // indirect
	github.com/ncruces/go-strftime v1.1.0 // indirect
	github.com/remyoudompheng/bigfft v0.0.0-20230129092748-24d4a6f8daec // indirect
	golang.org/x/sys v0.49.0 // indirect
	modernc.org/libc v1.79.0 // indirect
	modernc.org/mathutil v1.7.1 // indirect
	modernc.org/memory v1.12.1 // indirect
)

replace (
	github.com/holdfast-io/holdfast/acker => ../acker
	github.com/holdfast-io/holdfast/ingress => ../ingress
	github.com/holdfast-io/holdfast/pkg => ../pkg
	github.com/holdfast-io/holdfast/pkg/completion => ../pkg/completion
	github.com/holdfast-io/holdfast/recorder => ../recorder
	github.com/holdfast-io/holdfast/replayer => ../replayer
	github.com/holdfast-io/holdfast/standalone => ../standalone
)
