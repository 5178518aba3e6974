# make demo    environment, the toy through all stages, five modes, closed loop, a report with pictures: about eleven minutes
# make test    the tests;  make test-slow  those over twenty seconds too;  make test-long  those of many minutes too
# make toy     the same as the demo, for about an hour
# make bench   ratios of speed
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
RUN ?= runs/demo
# The toy is a chain of small operations: two threads help on an idle machine, and collapse when another process wants the second core.
IDLE := $(shell awk '{ print ($$1 < 0.7) ? 2 : 1 }' /proc/loadavg 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(IDLE)

.PHONY: demo toy test test-slow test-long lint bench report smoke

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(VENV)/bin/pip install -q -e ".[test,oracles,data]"
	$(VENV)/bin/pip install -q --no-deps ptlflow==0.4.2
	$(PY) -c "import triton" 2> /dev/null || $(VENV)/bin/pip install -q --no-deps triton==3.9.0
	touch $@

# SET1, SETL, SET2, SET3, EPISODES change the size of each part; `make toy` and `make smoke` are the same recipe at other sizes.
EPISODES ?= 100
LOOKS ?= clean
demo: $(VENV)/.core
	@test ! -e $(RUN) || { echo "$(RUN) exists; remove it, or name another folder: make demo RUN=runs/again"; exit 1; }
	$(PY) train.py --stage 1 --run $(RUN)/stage1 $(SET1)
	$(PY) train.py --stage latent --run $(RUN)/latent $(SETL)
	$(PY) train.py --stage 2 --init $(RUN)/stage1 --latent $(RUN)/latent --run $(RUN)/stage2 $(SET2)
	$(PY) train.py --stage 3 --init $(RUN)/stage2 --run $(RUN)/stage3 $(SET3)
	$(PY) sample.py --ckpt $(RUN)/stage3 --mode all --steps 2 --episodes 64 --out $(RUN)/samples $(SAMPLE)
	$(PY) evaluate.py --ckpt $(RUN)/stage3 --modes joint,vla --episodes $(EPISODES) --looks $(LOOKS) --steps 2 --execute 2 --max-steps 150 --random --gif 2 --out $(RUN)/evaluation $(EVALUATE)
	$(PY) report.py --run $(RUN)

toy:
	$(MAKE) demo RUN=$(if $(filter runs/demo,$(RUN)),runs/toy,$(RUN)) EPISODES=200 LOOKS=clean,randomized EVALUATE="--splits eval,held_out" \
		SET1="--steps 1500 --set episodes=200 windows=4000" SETL="--steps 3000" \
		SET2="--steps 2000 --set episodes=200 windows=4000" SET3="--steps 9000 --set episodes=2000 windows=24000 ema=0.998"

smoke:
	$(MAKE) demo RUN=$(RUN) EPISODES=4 SET1="--steps 8 --set episodes=3 windows=32" SETL="--steps 20 --set episodes=4" \
		SET2="--steps 8 --set episodes=3 windows=32" SET3="--steps 8 --set episodes=4 windows=32" \
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
