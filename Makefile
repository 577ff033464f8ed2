# What this project can do. Everything a target needs, it installs: Go modules by go itself, Debian packages through
# tools/need where that is possible.
.DEFAULT_GOAL := help
TOOL := go tool -modfile=tools/go.mod
FUZZTIME ?= 60s

.PHONY: help
help: ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 16

.PHONY: run
run: build ## build and start the hub with nothing to configure (stop it with Ctrl-C)
	@exec bin/coaphub serve

.PHONY: build
build: ## build bin/coaphub
	go build -trimpath -ldflags "-s -w -X main.version=$$(git describe --tags --always --dirty 2>/dev/null || echo unknown)" -o bin/coaphub ./cmd/coaphub

.PHONY: image
image: ## build the container image of all platforms, bin/image and bin/image.tar; PUSH=host/name:tag puts it into a registry
	@go run -C tools/image . -root "$(CURDIR)" -out "$(CURDIR)/bin" -push "$(PUSH)"

# What tests with other implementations need. Whatever could not be installed, the end of the test run names.
.PHONY: others
others:
	@tools/need coap-client-openssl libcoap3-bin
	@tools/need coap-client-gnutls libcoap3-bin
	@tools/need systemd-analyze systemd
	@tools/need curl curl
	@tools/need openssl openssl
	@tools/need scepclient scep
	@tools/need pki strongswan-pki libstrongswan-extra-plugins
	@tools/need node nodejs
	@tools/need npm npm
	@[ test/npm-coap/node_modules -nt test/npm-coap/package-lock.json ] || \
		npm ci --prefix test/npm-coap --ignore-scripts --no-audit --no-fund --silent || echo "could not install npm's coap" >&2
	@tools/need chromium chromium
	@[ web/node_modules/.package-lock.json -nt web/package-lock.json ] || \
		npm ci --prefix web --ignore-scripts --no-audit --no-fund --silent || echo "could not install the console's packages" >&2

.PHONY: test
test: others ## run all tests of all modules with the race detector, and say what was left out
	@COAPHUB_DOSE=day go run -C tools ./testrun

.PHONY: nightly
nightly: others ## the long doses: 200 rounds of kill -9, the ten-minute fleet, the TypeScript client, each fuzzer for FUZZTIME
	@COAPHUB_DOSE=night go run -C tools ./testrun -timeout 60m
	go test -tags typescript ./test/typescript
	@$(MAKE) --no-print-directory fuzz

.PHONY: lint
lint: ## bug finders, import arrows, and whether generated files are up to date
	$(TOOL) golangci-lint run --allow-parallel-runners ./...
	GOOS=linux GOARCH=arm GOARM=7 CGO_ENABLED=0 go vet ./... # numbers that do not fit 32 bits
	@before=$$(git status --porcelain; git diff | cksum); $(MAKE) --no-print-directory gen; \
	after=$$(git status --porcelain; git diff | cksum); \
	if [ "$$before" != "$$after" ]; then git status --short; echo "make gen changed files: commit what it made"; exit 1; fi

.PHONY: gen
gen: ## make the generated files (api/gen, api/typescript, docs/api.md, docs/config.md, web/dist), and check that no client of api/proto would break
	go generate ./...

.PHONY: screenshots
screenshots: others ## take the pictures of docs/console.md anew, from a hub with simulated devices
	@COAPHUB_SCREENSHOTS=$(CURDIR)/docs/console go test -count=1 -run '^TestScreenshots$$' ./test/console

.PHONY: bench
bench: ## measure a fresh hub and bare go-coap in turns, in about five minutes
	@go run ./test/load/bench

.PHONY: bench-full
bench-full: ## the same with all phases and transports, five rounds, into docs/performance.md
	@go run ./test/load/bench -all -rounds 5 -for 10s -write docs/performance.md

.PHONY: growth
growth: ## measure start and lists of a hub with 1 000 000 devices and 10 000 000 events; takes long, and 5 GB of /tmp
	@go run ./test/load/growth

.PHONY: scaling
scaling: ## measure what each part of a cluster costs, into docs/scaling.md, in about ten minutes
	@go run ./test/load/scaling -write docs/scaling.md

.PHONY: microbench
microbench: ## all benchmarks of the code, five runs each
	go test -run '^$$' -bench . -benchmem -count 5 ./...

.PHONY: compare
compare: ## benchmarks of PKG at the commit BASE and here, in turns, compared by benchstat (BENCH, ROUNDS, BENCHTIME)
	@tools/compare

.PHONY: fuzz
fuzz: ## each fuzzer for FUZZTIME (60s)
	@go run -C tools ./testrun -fuzz $(FUZZTIME)
