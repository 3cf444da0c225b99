module github.com/holdfast-io/holdfast/ingress

go 1.26.0
