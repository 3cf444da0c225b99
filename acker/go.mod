module github.com/holdfast-io/holdfast/acker

go 1.26.0
