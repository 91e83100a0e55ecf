# `make demo` serves the app, `make test` runs the tests, one file a core at a time. Both first set up .venv, and only
# when something has changed.
SHELL := /bin/bash
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -q
# mamba-ssm without its CUDA part: pure Python, built in seconds. Its Triton kernels are there all the same, for the app
# on CUDA, and so is its plain PyTorch reference, for the tests.
INSTALL_MAMBA := MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
	$(PIP) --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
APT := apt-get -qq -o=Dpkg::Use-Pty=0
export PYTHONUNBUFFERED := 1

.PHONY: demo test interop clean

demo: $(VENV)/ready-app
	$(VENV)/bin/python app.py

test: $(VENV)/ready-test
	$(VENV)/bin/python -m pytest tests -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Khronos' validator, three.js and, where runs/bpy has it, Blender open our files: tests/interop/README.md
interop: $(VENV)/ready-test
	npm ci --prefix tests/interop --no-audit --no-fund
	$(VENV)/bin/python tests/interop/check.py $(if $(wildcard runs/bpy/bin/python),--blender runs/bpy/bin/python) $(GLB)

clean:
	rm -rf $(VENV)

# Debian keeps venv apart from python3; numpy's wheels need Python 3.11 or newer.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed; make PYTHON=/path/to/python3 says which to use"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt_install,python3-venv); }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || exit 1
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/ready-app: requirements.txt packages.txt | $(VENV)/bin/python
	@$(call missing_packages,packages.txt)
	$(PIP) -r requirements.txt
	@if command -v nvidia-smi > /dev/null; then $(INSTALL_MAMBA); fi
	@touch $@

$(VENV)/ready-test: requirements-test.txt packages-test.txt $(VENV)/ready-app
	@$(call missing_packages,packages-test.txt)
	$(PIP) -r requirements-test.txt
	$(INSTALL_MAMBA)
	@touch $@

# Installs a file's Debian packages as root; says what is missing otherwise, and goes on: the tests name what they skip.
missing_packages = if command -v dpkg > /dev/null; then for package in $$(cat $(1)); do \
	dpkg -s $$package > /dev/null 2>&1 || { $(call apt_install,$$package); } || exit 1; done; fi
apt_install = if [ "$$(id -u)" = 0 ]; then echo "apt-get install $(1)"; $(APT) update || true; \
	DEBIAN_FRONTEND=noninteractive $(APT) install -y $(1) > /dev/null; \
	else echo "missing: please run  sudo apt-get install $(1)"; fi
