module github.com/holdfast-io/holdfast/recorder

go 1.26.0
