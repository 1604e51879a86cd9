# Every target sets up `.venv` first and reuses it while the files that define it stand still.
#   make serve ARGS="--port 8001"     EXTRA=gpu|cpu forces the engine build     PYTHON=python3.12 picks the interpreter

PYTHON ?= python3
ifndef EXTRA
EXTRA := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
endif
ifeq ($(filter $(EXTRA),cpu gpu),)
$(error EXTRA=$(EXTRA): choose cpu or gpu)
endif
BIN := .venv/bin
STAMP := .venv/.installed-$(EXTRA)

.PHONY: help install serve test gpu faults soak tutorial clients check audit sbom docs format bench lock clean

help:
	@echo "make install | serve [ARGS=...] | test | gpu | faults | soak [ARGS=...] | tutorial | clients | check | audit | sbom |"
	@echo "     docs | format | bench [ARGS=...] | lock | clean     (EXTRA=$(EXTRA))"

install: $(STAMP)

$(STAMP): pyproject.toml overrides-cpu.txt constraints-$(EXTRA).txt scripts/install
	PYTHON="$(PYTHON)" scripts/install $(EXTRA)

serve: install
	$(BIN)/aurora serve $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

faults: install
	$(BIN)/python -m pytest tests/faults -o junit_family=xunit1 --junitxml=faults.xml $(ARGS)

soak: install
	$(BIN)/python -m tests.faults.soak $(ARGS)

check: install
	BIN=$(BIN) scripts/check

audit: install
	BIN=$(BIN) scripts/audit

sbom: install
	$(BIN)/uv tool run --from "cyclonedx-bom>=7.5" cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o sbom.json $(BIN)/python

docs: install
	$(BIN)/python -m mkdocs build --strict

tutorial: install
	$(BIN)/python -m pytest tests/tutorial $(ARGS)

clients: install
	BIN=$(BIN) scripts/clients

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/aurora bench $(ARGS)

lock: install
	scripts/lock

clean:
	rm -rf .venv build dist
