module github.com/holdfast-io/holdfast/pkg/completion

go 1.26.0
