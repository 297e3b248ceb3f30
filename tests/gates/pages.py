"""Gate: the book is built as `make book` builds it, every page without a warning, and everything
that a page points at is there. Where a browser is installed, it looks at the same pages.

`python tests/gates/pages.py FOLDER` leaves the book in FOLDER.
"""

import html.parser
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote

import browser
from common import ROOT, finish, notebooks, read

from book.build import build
from book.text import outside_code

WORKERS = 2
RAW = {  # what only a site understands, and what a chapter writes instead
    r"^:{3,}": "a quotation whose first line is bold",
    r"\[-?@[\w:-]+[^\]]*\]": "a link to references.ipynb#key",
    r"(?<![\w`/])@(?:fig|tbl|sec)-\w": "[figure](#fig-name)",
}


class Links(html.parser.HTMLParser):
    "Collects the ids and the links of a page."

    def __init__(self, text=""):
        super().__init__()
        self.ids = set()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for key in ("id", "name"):
            if attrs.get(key):
                self.ids.add(attrs[key])
        for key in ("href", "src"):
            if attrs.get(key):
                self.links.append(attrs[key])


def broken(name, pages, folder):
    "The links of the page `name` that lead nowhere; other people's sites are not asked."
    for link in dict.fromkeys(pages[name].links):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        goal = os.path.normpath(Path(name).parent / path) if path else name
        if goal.startswith(".."):
            yield f"{link}: leaves the site"
        elif path and not (folder / goal).exists():
            yield f"{link}: no such file"
        elif anchor and goal in pages and anchor not in pages[goal].ids:
            yield f"{link}: no such heading or label"


def linked(folder):
    "{page: its ids and links} of the pages in a folder."
    files = sorted(folder.rglob("*.html"))
    return {p.relative_to(folder).as_posix(): Links(p.read_text()) for p in files}


def only_for_a_site(root=ROOT):
    "Marks that Jupyter would show as they are."
    for path in notebooks(root):
        for cell in read(path)["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            prose = []
            outside_code(cell["source"], collect(prose))
            for pattern, instead in RAW.items():
                if found := re.search(pattern, "\n".join(prose), re.M):
                    place = path.relative_to(root)
                    yield f"{place}: Jupyter shows {found[0]!r} as it is; write {instead}"


def collect(into):
    "A function that keeps each text it is given."

    def keep(text):
        into.append(text)
        return text

    return keep


def check(folder, workers=WORKERS):
    "Build the book in `folder`. Returns (complaints, {page: its ids and links})."
    made = build(folder, workers)
    found = [f"{page.name}: {c}" for page in made for c in page.complaints]
    pages = linked(folder)
    found += [f"{name}: {c}" for name in pages for c in broken(name, pages, folder)]
    return [*found, *only_for_a_site()], pages


def main(keep=None):
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="gate_") as scratch:
        folder = Path(keep or scratch).resolve() / "book"
        os.chdir(ROOT)
        found, pages = check(folder)
        links = sum(len(page.links) for page in pages.values())
        print(f"  {len(pages)} pages built in {time.time() - start:.0f} s")
        seen, said = browser.look(folder)
        print("\n".join(f"  {line}" for line in said))
    finish("pages", [*found, *seen], f"{len(pages)} pages, {links} links", start)


if __name__ == "__main__":
    main(*sys.argv[1:])
