"""What every gate needs: where things are, how a notebook is read, a scratch copy."""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # book/, and the library, are this checkout's
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    "runs",
    "_proc",
    "_docs",
    "_book",
    "build",
    "shared",
    "__pycache__",
    ".pytest_cache",
    ".ipynb_checkpoints",
    "*.egg-info",
)


def notebooks(root=ROOT):
    "Paths of all notebooks below nbs/, in the order in which nbdev runs them."
    nbs = root / "nbs"
    return sorted(
        p
        for p in nbs.rglob("*.ipynb")
        if not any(part[0] in "._" for part in p.relative_to(nbs).parts)
    )


def is_experiment(path):
    "Experiments are long: `ukd run` runs them, with the small parameters of dry.yaml."
    return Path(path).parent.name == "experiments"


def read(path):
    "The notebook as plain data, each cell's source as one string."
    nb = json.loads(Path(path).read_text())
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def front_matter(path):
    "Title, claim and options of the first cell, as nbdev reads them."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    return NBProcessor(Path(path), procs=FrontmatterProc, process=True).nb.frontmatter_


@contextlib.contextmanager
def scratch(root=ROOT):
    "A copy of the working tree: what a gate writes there leaves the real one as it is."
    with tempfile.TemporaryDirectory(prefix="gate_") as folder:
        yield Path(
            shutil.copytree(root, Path(folder) / "unpaired_kd", symlinks=True, ignore=LEFT_OUT)
        )


def finish(name, complaints, summary, start):
    "Print the verdict of a gate and leave with 0 or 1."
    for c in complaints:
        print(f"  {name}: {c}")
    print(
        f"{'FAIL' if complaints else 'ok  '} {name}: {summary} ({time.time() - start:.0f} s)",
        flush=True,
    )
    sys.exit(1 if complaints else 0)
