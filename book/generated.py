"""Two chapters that are made from others: `python -m book.generated --write` (`make prepare`).

`nbs/references.ipynb` lists nbs/references.bib, one heading for each key, so that a link to a
source works in Jupyter too. `nbs/boxes.ipynb` gathers the boxes "Paper, code, and here".
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from posixpath import normpath

from nbdev.config import get_config

from book.processors import title_of
from book.reading import order
from book.sources import as_text, sources
from book.text import joined, outside_code

QUOTED = re.compile(r"^> \*\*((?:Paper|The paper)[^*\n]*?here[^*\n]*)\*\*(.*(?:\n>.*)*)", re.M)
LINK = re.compile(r"(\]\()(?!https?://|mailto:)([^)\s]+)(\))")


def notebook(texts):
    "A notebook of Markdown cells, as nbdev leaves one behind."
    cells = [
        {
            "cell_type": "markdown",
            "id": hashlib.sha256(text.encode()).hexdigest()[:8],
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        for text in texts
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def references():
    "The chapter of references: one cell, and one heading, for each key."
    told = "# Sources\n\n> What the chapters cite, by the key under which they cite it."
    made = "Written from `nbs/references.bib` by `make prepare`."
    known = [(as_text(entry), key) for key, entry in sources().items()]
    known.sort(key=lambda pair: pair[0].lower())
    return notebook([told, made, *(f"### {key}\n\n{text}" for text, key in known)])


def moved(text, chapter):
    "A chapter's Markdown with its links as they are written from nbs/."
    place = Path(chapter).parent.as_posix()

    def whole(found):
        target = found[2]
        goal = f"{chapter}{target}" if target[0] == "#" else normpath(f"{place}/{target}")
        return f"{found[1]}{goal}{found[3]}"

    return outside_code(text, lambda part: LINK.sub(whole, part))


def boxes():
    "The chapter of boxes, in the order of reading."
    told = (
        "# Paper, code, and here\n\n"
        "> Every place where a paper, its published code and this library differ, on one page."
    )
    made = "Gathered from the chapters by `make prepare`; each heading leads to its chapter."
    texts = [told, made]
    for chapter in order():
        if chapter == "boxes.ipynb":
            continue
        cells = json.loads((get_config().nbs_path / chapter).read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join(joined(c["source"]) for c in cells if c["cell_type"] == "markdown")
        found = [moved(m[0], chapter) for m in QUOTED.finditer(text)]
        if found:
            heading = f"## [{title_of(chapter)}]({chapter})"
            texts.append("\n\n".join([heading, *found]))
    return notebook(texts)


MAKERS = {"references.ipynb": references, "boxes.ipynb": boxes}


def stale():
    "The chapters that are not what would be written now."
    for name, make in MAKERS.items():
        path = get_config().nbs_path / name
        if not path.exists() or path.read_text(encoding="utf-8") != make():
            yield f"nbs/{name} is out of date: run `make prepare`"


def main():
    if "--write" in sys.argv:
        for name, make in MAKERS.items():
            (get_config().nbs_path / name).write_text(make(), encoding="utf-8")
    else:
        print("\n".join(stale()))


if __name__ == "__main__":
    main()
