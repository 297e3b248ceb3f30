# Three commands: `make demo`, `make test`, `make book`. Each makes .venv on its first run and installs the project into
# it once. A fourth, `make gpu`, is for a machine with an accelerator: it uses the Python and torch that are there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: demo test book gpu prepare clean

demo: $(READY)
	$(BIN)/ukd run lotus --out runs/demo

test: $(READY)
	$(BIN)/python tests/gates

# the book as a folder of pages, to be opened from disk: _book/index.html
book: $(READY)
	$(BIN)/python -m book $(ARGS)

# installs nothing and needs no network; at most six minutes. UKD_WHEELS=folder: packages that were carried here
gpu:
	$(PYTHON) tests/gpu $(ARGS)

# after editing notebooks: write the library, tidy the notebooks, write README.md and the chapters made from others
prepare: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/gates/readme.py --write
	$(BIN)/python -m book.generated --write

# installs again only when one of these three files has changed
$(READY): pyproject.toml constraints.txt settings.ini
	@echo "Installing into $(VENV), once (a minute or a few; PyTorch is large) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -e ".[dev]" -c constraints.txt
	@touch $@

clean:
	rm -rf _proc _docs _book dist
