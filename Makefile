.PHONY: test race lint fuzz cart pictures bench ci

test: ## the tests
	go test ./...

race: ## the tests with the race detector; skipped ones fail
	.ci/run race

lint: ## gofmt, go vet and golangci-lint
	.ci/run format vet lint

fuzz: ## each fuzz target for a short time
	.ci/run fuzz

cart: ## the example application
	go run ./examples/cart

pictures: ## the screenshots in the README, anew; they need Chromium, and look best with the font Inter
	go test ./examples/cart -run TestRacesInBrowser -count=1 -update

bench: ## the benchmarks
	go test -run '^$$' -bench . -benchmem ./...

ci: ## everything that continuous integration checks
	.ci/run
