# make setup   the environment: .venv, dependencies, the native library; TENSORFLOW_VERSION=X.Y picks the TensorFlow
# make test    set up, then run the tests, on the native op and on the fallback
# make demo    set up, then train DeepFM on MovieLens-100k
# make demo-logs  set up, then the road from files to a model that serves, on a made log of ten million rows (ten minutes,
#              2 GB of memory, 3 GB of disk); ROWS=N for another length
# make wheel   set up, then build a wheel for the TensorFlow of .venv, and check it, into dist/
# make matrix  test every supported TensorFlow with every Python (GRID="X.Y-3.10 ..." picks cells, REFERENCE=1 tests the
#              fallback too, PYTHONS=path:path says where interpreters are), into build/matrix/results.md
# make docs    pages of the public names, from the docstrings, into build/docs
# make sanitize  fuzz the kernels, those of CUDA on the CPU, the tables and the libsvm parser under ASan, UBSan and TSan
# make bench   set up, then measure, and write bench/RESULTS.md (a quarter of an hour)
# make bench-train   training steps over vocabulary size (20 minutes, 24 GB), into the same report
# make bench-serve   latencies of serving, of ours and of everybody else's (half an hour), into the same report
# make bench-rank    ranking a million items by an FM, 20,000 by a DeepFM (three minutes), into the same report
# make bench-learning   how well the defaults learn, and tuned peers (an hour), into the same report
# make bench-data   from files to batches, beside everybody else (an hour, 20 GB), into the same report
# make bench-full   the whole grid of shapes (a night)
# make bench-peers   environments of PyTorch, FBGEMM, DeepCTR, xLearn, ONNX, scikit-learn
PYTHON ?= python3
TENSORFLOW ?= tensorflow-cpu# or tensorflow, for GPUs
BIN := .venv/bin
TENSORFLOW_VERSION ?= $(shell $(PYTHON) -c 'import runpy; print(runpy.run_path("deepfm_ops/_version.py")["TENSORFLOW"][-1])')
SOURCES := $(shell find csrc -type f)

INDEPENDENT := $(addprefix models/test_,epochs head_streams private_names saving) \
  $(addprefix serving/test_,crafted rank scorer serve shards) \
  $(addprefix cluster/test_,config feeding launch model sharded_heads storage training) \
  $(addprefix op/test_,kernels processes changing_inputs native_fuzz) \
  $(addprefix cuda/test_,cases device_code dlpack tensorflow) \
  $(addprefix data/test_,bad_records criteo dictionary_file libsvm synthetic sources stream) \
  $(addprefix features/test_,dictionary values tables bad_input datasets vocabulary) \
  $(addprefix package/test_,first_use forks install wheel types)# of the op and its fallback: tested once

.PHONY: setup test wheel matrix docs demo demo-logs demo-cluster bench bench-full bench-train bench-serve bench-rank bench-learning \
  bench-data bench-cluster bench-peers sanitize lint format clean FORCE

setup: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

# Rewritten when another TensorFlow is asked for than the one that is there.
.venv/tensorflow: .venv/bin/python FORCE
	@echo "$(TENSORFLOW)==$(TENSORFLOW_VERSION).*" | cmp --quiet - $@ || echo "$(TENSORFLOW)==$(TENSORFLOW_VERSION).*" >$@

.venv/dependencies: .venv/tensorflow pyproject.toml setup.py deepfm_ops/_version.py
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" \
	  "$$(cat .venv/tensorflow)"
	touch $@

.venv/installed: .venv/dependencies deepfm_ops/_build.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal
	DEEPFM_OPS_BACKEND=reference $(BIN)/python -m pytest -q -n 2 --dist worksteal $(INDEPENDENT:%=--ignore=tests/%.py)

# The library finds TensorFlow's in the process, which has imported it: no copy of them belongs into the wheel.
wheel: setup
	rm -rf build/wheel
	DEEPFM_OPS_BUILD=native $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude "libtensorflow_*" --wheel-dir dist build/wheel/*.whl

matrix:
	$(PYTHON) tests/matrix.py $(GRID) $(if $(REFERENCE),--reference)

docs: setup
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[docs]"
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python docs/build.py build/docs

demo: setup
	$(BIN)/python examples/demo.py

ROWS ?= 10000000
demo-logs: setup
	$(BIN)/python examples/criteo.py --rows $(ROWS)

demo-cluster: setup
	$(BIN)/python -m deepfm_ops.cluster launch --ps 2 --workers 2 examples/cluster.py

bench: setup
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/op.py
	$(BIN)/python bench/report.py

bench-serve: setup
	$(BIN)/python bench/serve.py
	$(BIN)/python bench/report.py

bench-rank: setup
	$(BIN)/python bench/rank.py
	$(BIN)/python bench/report.py

bench-train: setup
	$(BIN)/python bench/train.py
	$(BIN)/python bench/fit.py
	$(BIN)/python bench/report.py

bench-learning: setup
	$(BIN)/python bench/learning.py
	$(BIN)/python bench/learning.py --one-pass
	$(BIN)/python bench/report.py

bench-data: setup
	$(BIN)/python bench/data.py
	$(BIN)/python bench/report.py

# Its networks are namespaces of their own, which take root, or a system that lets anyone make one.
bench-cluster: setup
	$(BIN)/python bench/cluster.py
	$(BIN)/python bench/report.py

bench-full: setup
	$(BIN)/python bench/op.py --full --json bench/results/op-full.json

# The peers that `make bench` measures too, each in an environment of its own.
bench-peers:
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet torch==2.13.0 fbgemm-gpu-cpu==1.8.0 numpy
	$(PYTHON) -m venv .venv-deepctr
	.venv-deepctr/bin/python -m pip install --quiet --no-deps deepctr==0.9.4 "tf-keras==$(TENSORFLOW_VERSION).*"
	.venv-deepctr/bin/python -m pip install --quiet "tensorflow-cpu==$(TENSORFLOW_VERSION).*" h5py requests pandas scikit-learn setuptools
	$(PYTHON) -m venv .venv-xlearn
	.venv-xlearn/bin/python -m pip install --quiet setuptools wheel numpy scipy pandas scikit-learn
	USER=bench .venv-xlearn/bin/python -m pip install --quiet --no-build-isolation xlearn==0.40a1
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/python -m pip install --quiet "tensorflow-cpu==$(TENSORFLOW_VERSION).*" tf2onnx==1.17.0 onnxruntime==1.32.0 onnx==1.23.2
	$(PYTHON) -m venv .venv-sklearn
	.venv-sklearn/bin/python -m pip install --quiet scikit-learn==1.9.1 pandas==3.1.1 pyarrow==26.0.1

# The kernels and the tables under sanitizers, in programs without Python and TensorFlow.
# Tens of minutes on two cores, compiling included; CASES=350000 for a million of the kernels' under ASan.
CASES ?= 20000
TSAN_CASES = $(shell expr $(CASES) / 6)
vpath %.cc csrc/kernels csrc/tables tests/native
OBJECTS_OF = $(patsubst %.cc,build/$(1)/%.o,$(notdir $(wildcard csrc/$(2)/*.cc)))
FLAGS_asan := -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_tsan := -fsanitize=thread
ISA_fm_cpu_avx2 := -mavx2 -mfma -mf16c
ISA_fm_cpu_avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c

define FUZZ
build/$(1)/%.o: %.cc $(SOURCES) $(wildcard tests/native/*.h)
	@mkdir -p build/$(1)
	$$(CXX) -std=c++17 -O1 -g1 -Wall -DDEEPFM_MAX_VECS=2 $$(ISA_$$*) $$(FLAGS_$(1)) -c $$< -o $$@
build/$(1)/fuzz: $$(call OBJECTS_OF,$(1),kernels)
build/$(1)/fuzz_tables: $$(call OBJECTS_OF,$(1),tables)
build/$(1)/fuzz build/$(1)/fuzz_tables: build/$(1)/fuzz%: build/$(1)/fuzz%.o
	$$(CXX) $$(FLAGS_$(1)) $$^ -o $$@ -pthread
endef
$(foreach kind,asan tsan,$(eval $(call FUZZ,$(kind))))

# The CUDA kernels on the CPU. A CUDA thread is a thread where races are looked for, which takes long: fewer cases.
CUDA_CASES = $(shell expr $(CASES) / 20)
CUDA_FLAGS_tsan := -DDEEPFM_EMULATE_WITH_THREADS

define FUZZ_CUDA
build/$(1)/cuda/%.o: % $(SOURCES) $(wildcard tests/native/*.h)
	@mkdir -p $$(dir $$@)
	$$(CXX) -std=c++17 -O1 -g1 -Wall $$(FLAGS_$(1)) $$(CUDA_FLAGS_$(1)) -x c++ -c $$< -o $$@
build/$(1)/fuzz_cuda: $(patsubst %,build/$(1)/cuda/%.o,$(wildcard csrc/cuda/*.cu) tests/native/fuzz_cuda.cc)
	$$(CXX) $$(FLAGS_$(1)) $$^ -o $$@ -pthread
endef
$(foreach kind,asan tsan,$(eval $(call FUZZ_CUDA,$(kind))))

build/asan/fuzz_libsvm: tests/native/fuzz_libsvm.cc $(SOURCES)
	@mkdir -p build/asan
	$(CXX) -std=c++17 -O1 -g -Wall $(FLAGS_asan) $< -o $@

sanitize: $(foreach kind,asan tsan,$(addprefix build/$(kind)/fuzz,_cuda _tables) build/$(kind)/fuzz) build/asan/fuzz_libsvm
	build/asan/fuzz $(CASES) 1
	build/tsan/fuzz $(TSAN_CASES) 2
	build/asan/fuzz_cuda $(CUDA_CASES) 1
	build/tsan/fuzz_cuda $(shell expr $(CUDA_CASES) / 20) 2
	build/asan/fuzz_tables $(CASES) 1
	build/tsan/fuzz_tables $(CASES) 2
	build/asan/fuzz_libsvm $(CASES) 3

FORMATTED := 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cu' 'csrc/*.cuh'
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(FORMATTED))

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(FORMATTED))

clean:
	rm -rf .venv build dist *.egg-info deepfm_ops/*.so deepfm_ops/_build_info.json deepfm_ops/_csrc
