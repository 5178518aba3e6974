# make demo    environment, the toy through all stages, five modes, closed loop, a report with pictures: under ten minutes
# make test    the tests;  make test-slow  those over twenty seconds too;  make test-long  those of many minutes too
# make toy     the same as the demo, for about an hour
# make bench   ratios of speed
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
RUN ?= runs/demo
# The toy is a chain of small operations: a second thread hardly helps it, so each command has one, and two of them run at a time.
export OMP_NUM_THREADS ?= 1
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

# Sizes; `make toy` and `make smoke` are the same recipe at others.
EPISODES ?= 100
LOOKS ?= clean
VIDEOS ?= --episodes 100 --windows 2000
DEMONSTRATIONS ?= --episodes 1000 --windows 12000

run: $(RUN)/report.md

$(RUN)/stage1/curve.png:
	$(PY) train.py --stage 1 --run $(RUN)/stage1 $(SET1)
$(RUN)/latent/figures.json:
	$(ASIDE) $(PY) train.py --stage latent --run $(RUN)/latent $(SETL)
$(RUN)/windows2.safetensors: $(RUN)/latent/figures.json
	$(ASIDE) $(PY) data.py cache --levels 2,3,4,5 --latent $(RUN)/latent/latent_action.safetensors --out $@ $(VIDEOS)
$(RUN)/windows3.safetensors: | $(RUN)/windows2.safetensors      # not of them, but after them: they are needed first
	$(ASIDE) $(PY) data.py cache --levels 6 --out $@ $(DEMONSTRATIONS)
$(RUN)/stage2/curve.png: $(RUN)/stage1/curve.png $(RUN)/windows2.safetensors
	$(PY) train.py --stage 2 --init $(RUN)/stage1 --latent $(RUN)/latent --cache $(RUN)/windows2.safetensors --run $(RUN)/stage2 $(SET2)
$(RUN)/stage3/curve.png: $(RUN)/stage2/curve.png $(RUN)/windows3.safetensors
	$(PY) train.py --stage 3 --init $(RUN)/stage2 --cache $(RUN)/windows3.safetensors --run $(RUN)/stage3 $(SET3)
$(RUN)/samples/figures.json: $(RUN)/stage3/curve.png
	$(ASIDE) $(PY) sample.py --ckpt $(RUN)/stage3 --mode all --steps 2 --episodes 64 --out $(RUN)/samples $(SAMPLE)
$(RUN)/evaluation/evaluation.json: $(RUN)/stage3/curve.png
	$(PY) evaluate.py --ckpt $(RUN)/stage3 --modes joint,vla --episodes $(EPISODES) --looks $(LOOKS) --steps 2 --execute 2 --max-steps 150 --random --gif 2 --out $(RUN)/evaluation $(EVALUATE)
$(RUN)/report.md: $(RUN)/samples/figures.json $(RUN)/evaluation/evaluation.json
	$(PY) report.py --run $(RUN)

ADAMW := optimizer=adamw batch=32 lr=1e-3
toy:
	$(MAKE) demo RUN=$(if $(filter runs/demo,$(RUN)),runs/toy,$(RUN)) EPISODES=200 LOOKS=clean,randomized EVALUATE="--splits eval,held_out" \
		VIDEOS="--episodes 200 --windows 4000" DEMONSTRATIONS="--episodes 2000 --windows 24000" \
		SET1="--steps 1000 --set episodes=200 windows=4000 $(ADAMW)" SETL="--steps 3000" \
		SET2="--steps 1500 --set $(ADAMW)" SET3="--steps 8500 --set ema=0.998 $(ADAMW)"

smoke:
	$(MAKE) demo RUN=$(RUN) EPISODES=4 VIDEOS="--episodes 3 --windows 32" DEMONSTRATIONS="--episodes 4 --windows 32" \
		SET1="--steps 8 --set episodes=3 windows=32" SETL="--steps 20 --set episodes=4" SET2="--steps 8" SET3="--steps 8" \
		SAMPLE="--episodes 4 --steps 2" EVALUATE="--max-steps 24 --steps 2"

test: $(VENV)/.test
	$(PY) -m pytest -m "not slow and not long"

test-slow: $(VENV)/.test
	$(PY) -m pytest -m "not long"

test-long: $(VENV)/.test
	$(PY) -m pytest

bench: $(VENV)/.core
	$(PY) bench.py --out docs/bench.md

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
