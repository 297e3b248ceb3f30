# Two commands: `make demo` and `make test`. Each makes .venv on its first run and installs the project into it once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: demo test prepare clean

demo: $(READY)
	$(BIN)/ukd run lotus --out runs/demo

test: $(READY)
	$(BIN)/python tests/gates

# after editing notebooks: write the library, tidy the notebooks, write README.md
prepare: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/gates/readme.py --write

# installs again only when one of these three files has changed
$(READY): pyproject.toml constraints.txt settings.ini
	@echo "Installing into $(VENV), once (a minute or a few; PyTorch is large) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -e ".[dev]" -c constraints.txt
	@touch $@

clean:
	rm -rf _proc _docs dist
