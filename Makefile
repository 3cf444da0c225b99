# Everything that is done with this tree, by name. `make help` lists it.
SHELL      := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

SERVICES := ingress recorder acker replayer standalone
MODULES  := pkg pkg/completion ingress recorder acker replayer standalone e2e
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X github.com/holdfast-io/holdfast/pkg/service.version=$(VERSION)
# Some tests fill a small file system, which takes root, or a namespace where one
# is root.
ASROOT   := $(shell [ "$$(id -u)" = 0 ] || { unshare -rm true 2>/dev/null && echo unshare -rm; })
# Not from the cache: go does not see that the scenarios run the binaries.
GOTEST   := $(ASROOT) go test -count=1 -timeout 10m
# What fuzzing may take for each target.
FUZZTIME ?= 30s

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: build
build: ## build the five binaries into bin/
	@mkdir -p bin
	@for s in $(SERVICES); do CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/$$s ./$$s/cmd/$$s; done
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/exampleapi ./e2e/cmd/exampleapi

.PHONY: run
run: build ## run standalone in front of UPSTREAM=http://…, or of an example API
	@UPSTREAM='$(UPSTREAM)' e2e/run.sh

.PHONY: demo
demo: build ## break an API and this gateway under load, replay, and count what was lost
	@go run ./e2e/cmd/demo -bin bin

.PHONY: test
test: tools build ## run all tests, and fuzz the edge for FUZZTIME; gets what they need by package manager
	@tools/need.sh python3=python3 curl=curl nginx=nginx-light haproxy=haproxy
	@$(GOTEST) work
	@cd e2e && go test -run '^$$' -fuzz '^FuzzEdge$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 5s ./edge/fuzz

.PHONY: test-race
test-race: tools build ## run the tests of every package with the race detector
	@tools/need.sh python3=python3 curl=curl nginx=nginx-light haproxy=haproxy
	@$(GOTEST) -race work

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME=30s
	@for m in $(MODULES); do \
	  for p in $$(cd $$m && go list ./...); do \
	    for f in $$(cd $$m && go test -list '^Fuzz' $$p | grep ^Fuzz || true); do \
	      echo "$$p $$f"; (cd $$m && go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5s $$p); \
	    done; done; done

.PHONY: mutants
mutants: tools build ## break the code on purpose, one way at a time, and see a test catch each
	@go run ./e2e/cmd/mutants

.PHONY: bench
bench: build ## compare with nginx: requests/s, latency, CPU and memory, side by side
	@tools/need.sh nginx=nginx-light wrk=wrk
	@go run ./e2e/cmd/bench -bin bin

.PHONY: bench-connections
bench-connections: build ## what idle and slow clients cost one ingress
	@tools/need.sh wrk=wrk
	@go run ./e2e/cmd/bench -bin bin -idle 10000
	@go run ./e2e/cmd/bench -bin bin -slow 200

.PHONY: bench-memory
bench-memory: build ## send 5 GiB of large bodies through standalone; its memory must stay below 300 MiB
	@go run ./e2e/cmd/bench -bin bin -bodies 5120

.PHONY: lint
lint: tools ## run staticcheck in every module
	@for m in $(MODULES); do (cd $$m && GOWORK=off $(CURDIR)/.tools/staticcheck ./...); done

.PHONY: verify
verify: ## check format, vet, lint, tidiness, and that each module builds alone
	@files=$$(gofmt -l $(MODULES)); [ -z "$$files" ] || { echo "make fix formats these files: $$files" >&2; exit 1; }
	@for m in $(MODULES); do \
	  (cd $$m && export GOWORK=off && go build ./... && go vet ./... && go mod tidy -diff) || { echo "module $$m is not in order; make fix may help" >&2; exit 1; }; done
	@$(MAKE) --no-print-directory lint

.PHONY: fix
fix: ## format, and tidy every module
	@gofmt -w $(MODULES)
	@for m in $(MODULES); do (cd $$m && GOWORK=off go mod tidy); done

# The nats command, nats-server, h2spec and staticcheck, at the versions of tools/go.mod.
# Where they stand is the same for the tests.
.PHONY: tools
tools:
	@cd tools && GOWORK=off GOBIN=$(CURDIR)/.tools go build -o $(CURDIR)/.tools/ tool
