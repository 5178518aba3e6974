# make demo    environment, the toy through all stages, five modes, closed loop, a report with pictures: twelve minutes
# make test    the tests;  make test-slow  those over twenty seconds too;  make test-long  those of many minutes too
# make toy     the same as the demo, for about an hour
# make bench   ratios of speed
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
RUN ?= runs/demo
# The toy is a chain of small operations: a second thread hardly helps it, so each command has one, and two of them run at a time; of
# stage 3, beside which nothing is left to do, two ranks.
export OMP_NUM_THREADS ?= 1
# Memory of a step is kept for the next: glibc would give it back and take it again, a twentieth of the time.
export MALLOC_TRIM_THRESHOLD_ ?= 1000000000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
ASIDE := TQDM_DISABLE=1

.PHONY: demo run toy test test-slow test-long lint bench smoke

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(VENV)/bin/pip install -q -e ".[test,oracles,data]"
	$(VENV)/bin/pip install -q --no-deps ptlflow==0.4.2
	$(PY) -c "import triton" 2> /dev/null || $(VENV)/bin/pip install -q --no-deps triton==3.9.0
	touch $@

# What a run is made of. A part that is there is not made again, so a run that was interrupted goes on where it was.
demo: $(VENV)/.core
	@$(MAKE) --no-print-directory -j2 run
	@echo "look at $(RUN)/report.html; for another run: make demo RUN=runs/again"

# Sizes are those of presets.toml: the quick recipe, or with LONG=--long the long one. TINY, CACHE, LATENT, ... are for `make smoke`.
# The long recipe mixes random motion and other looks into the demonstrations of stage 3, so that modes read what they are given.
MIX ?= worlds/toy.json
TRUTH ?= --windows 96
LOOP ?= --episodes 100 --max-steps 150 --execute 2 --gif 2

run: $(RUN)/report.md

$(RUN)/stage1/curve.png:
	$(PY) train.py --stage 1 --out $(RUN)/stage1 $(LONG) $(TINY)
$(RUN)/latent/figures.json:
	$(ASIDE) $(PY) train.py --stage latent --out $(RUN)/latent $(LONG) $(TINY)
$(RUN)/windows2.safetensors: $(RUN)/latent/figures.json
	$(ASIDE) $(PY) data.py cache --stage 2 --latent $(RUN)/latent --out $@ $(LONG) $(CACHE)
$(RUN)/windows3.safetensors: | $(RUN)/windows2.safetensors      # not of them, but after them: they are needed first
	$(ASIDE) $(PY) data.py cache --stage 3 --data $(MIX) --out $@ $(LONG) $(CACHE)
$(RUN)/stage2/curve.png: $(RUN)/stage1/curve.png $(RUN)/windows2.safetensors
	$(PY) train.py --stage 2 --init $(RUN)/stage1 --latent $(RUN)/latent --cache $(RUN)/windows2.safetensors --out $(RUN)/stage2 $(LONG) $(TINY)
$(RUN)/stage3/curve.png: $(RUN)/stage2/curve.png $(RUN)/windows3.safetensors
	$(VENV)/bin/torchrun --nproc-per-node 2 train.py --stage 3 --init $(RUN)/stage2 --cache $(RUN)/windows3.safetensors --out $(RUN)/stage3 $(LONG) $(TINY)
$(RUN)/samples/figures.json: $(RUN)/stage3/curve.png
	$(ASIDE) $(PY) sample.py --ckpt $(RUN)/stage3 --mode all --steps 2 --episodes 64 --out $(RUN)/samples $(SAMPLE)
$(RUN)/evaluation/evaluation.json: $(RUN)/stage3/curve.png
	$(PY) -m scripts.evaluate --ckpt $(RUN)/stage3 --modes joint,vla --steps 2 --random $(LOOP) --out $(RUN)/evaluation
$(RUN)/truth.json: $(RUN)/stage3/curve.png
	$(PY) -m scripts.truth --ckpt $(RUN)/stage3 --out $@ $(TRUTH)
$(RUN)/report.md: $(RUN)/samples/figures.json $(RUN)/evaluation/evaluation.json $(RUN)/truth.json
	$(PY) -m scripts.report --run $(RUN)

toy:
	$(MAKE) demo RUN=$(if $(filter runs/demo,$(RUN)),runs/toy,$(RUN)) LONG=--long MIX=worlds/toy_modes.json TRUTH="--steps 1 2 4 10" \
		LOOP="$(LOOP) --episodes 200 --set split=eval,held_out randomized=false,true"

smoke:
	$(MAKE) demo RUN=$(RUN) TINY="--steps 8 --set episodes=3 windows=32" CACHE="--episodes 3 --windows 32" \
		SAMPLE="--episodes 4" TRUTH="--windows 8" LOOP="--episodes 2 --max-steps 24 --gif 1"

test: $(VENV)/.test
	$(PY) -m pytest -n 2 --dist loadgroup -m "not slow and not long"

test-slow: $(VENV)/.test
	$(PY) -m pytest -m "not long"

test-long: $(VENV)/.test
	$(PY) -m pytest

bench: $(VENV)/.core
	$(PY) -m scripts.bench > docs/bench.tmp && mv docs/bench.tmp docs/bench.md

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
