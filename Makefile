# `make demo` trains a small agent and draws its curve, `make test` runs the tests. Both install what they need into .venv.
# `make test-slurm` sends a figure through a real Slurm; as root on Debian, where it installs slurm-wlm and munge.
PYTHON ?= python3
DEMO = --env cartpole-swingup --action-repeat 4 --width-scale 0.25 --batch-size 128 --buffer-size 20000 --learning-starts 1000 \
	--total-timesteps 7000 --eval-interval 1000 --eval-episodes 5 --exp-name demo

.PHONY: demo test test-slurm evidence operations
.DELETE_ON_ERROR:

demo: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python mst_mrq.py $(DEMO)
	.venv/bin/python -m analysis.curves runs/cartpole-swingup__demo__* --out figures/demo

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

test-slurm: .venv/installed
	.venv/bin/python -m pytest -s -rs tests/slurm_check.py

.venv/installed: requirements.txt requirements-analysis.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: this needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

# renews what is made from results/: the notebook's outputs, the pictures and the tables of docs/evidence.md
SMALL = small-sac-w1d1
evidence: .venv/installed
	RUNS=../../results/small/runs SIZE=small MUJOCO_GL=disable .venv/bin/jupyter execute --inplace analysis/notebooks/*.ipynb
	.venv/bin/python -m analysis.figure depth --runs results/depth --measure return --github --no-caption --out figures
	.venv/bin/python -m analysis.curves results/small/runs --metric plasticity/actor_dormant_ratio --github --no-caption \
		--label $(SMALL)-cdense-adense=Dense --label $(SMALL)-csst-asst=SST --label $(SMALL)-cdst-adst=DST \
		--label $(SMALL)-cdst-asst=MST --label '$(SMALL)-csst-adst=MST reversed' --out figures/small_dormant
	cp figures/depth_light.svg figures/depth_dark.svg figures/small_dormant_light.svg figures/small_dormant_dark.svg docs/images
	.venv/bin/python -m analysis.tables --fill docs/evidence.md

# copies what stands below OPERATIONS in mst_sac.py into the other scripts
operations:
	for script in mst_ddpg mst_mrq mst_mrsac; do \
		sed '/^# OPERATIONS/,$$d' $$script.py > $$script.new && sed -n '/^# OPERATIONS/,$$p' mst_sac.py >> $$script.new && \
		mv $$script.new $$script.py; \
	done
