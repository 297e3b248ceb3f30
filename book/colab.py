"""Copies of the chapters for Colab, each with one more cell on top that installs the library.

`python -m book.colab FOLDER` writes them; the workflow docs.yaml puts them on the branch `colab`,
where the links under the titles lead. The chapters themselves stay as they are.
"""

import hashlib
import json
import sys
from pathlib import Path

from nbdev.config import get_config

EXTRAS = "run,dicom,volumes,log"


def first_cell(place):
    "The cell that fetches the book, installs the library and goes to the chapter's folder."
    config = get_config()
    home = f"/content/{config.repo}"
    folder = f"{home}/{config.nbs_path.name}/{Path(place).parent.as_posix()}".removesuffix("/.")
    lines = [
        "# Run this cell first: it fetches the book and installs the library (about a minute).",
        f"!git clone -q --depth 1 --branch {config.branch} {config.git_url} {home}",
        f'%pip install -q "{home}[{EXTRAS}]"',
        f"%cd -q {folder}",
    ]
    return {
        "cell_type": "code",
        "id": hashlib.sha256(str(place).encode()).hexdigest()[:8],
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": "\n".join(lines),
    }


def write(folder):
    "A copy of each chapter in `folder`, under its path in the repository."
    nbs = get_config().nbs_path
    for path in sorted(nbs.rglob("*.ipynb")):
        place = path.relative_to(nbs)
        if any(part[0] in "._" for part in place.parts):
            continue
        nb = json.loads(path.read_text(encoding="utf-8"))
        nb["cells"].insert(0, first_cell(place))
        target = Path(folder) / nbs.name / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
