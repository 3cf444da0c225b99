module github.com/holdfast-io/holdfast/replayer

go 1.26.0
