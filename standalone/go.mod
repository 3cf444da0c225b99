module github.com/holdfast-io/holdfast/standalone

go 1.26.0
