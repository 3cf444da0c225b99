module github.com/holdfast-io/holdfast/e2e

go 1.26.0
