"""What the site changes in a chapter that Jupyter shows as it is.

nbdev runs these after its own processors, for Quarto and for our own pages alike (settings.ini:
`procs`). A chapter is written for Jupyter: boxes are quotations, sources are links to the page of
references, a figure's caption is an output below it. Here they become callouts, citations and
captions.
"""

import ast
import importlib
import json
import re
from pathlib import Path
from posixpath import relpath

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.showdoc import show_doc

from book.reading import main_path, neighbours
from book.renderer import documented, own_site
from book.sources import as_text, sources
from book.text import joined, options, outside_code, outside_fences

REFERENCES = "references.ipynb"
CITED = re.compile(r"\[([^\]\n]+)\]\((?:\.{0,2}/)*(?:[\w-]+/)*references\.ipynb#([\w:-]+)\)")
FIGURE = re.compile(r"\[[Ff]igures?\]\(#(fig-[\w-]+)\)")
QUOTATION = re.compile(r"^>.*(?:\n>.*)*", re.M)
BOX = re.compile(r"^> \*\*([^*\n]+?)\.?\*\*[ \t]*(.*)(?:\n|$)")
NOISE = re.compile(r"\d+%\|.*\||\[IPKernelApp\]")
SETS_UP = '#| code-fold: true\n#| code-summary: "Imports and set-up"'


def place_of(nb):
    "The notebook's path below nbs/."
    path = Path(nb.path_).resolve()
    root = get_config().nbs_path.resolve()
    return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)


# ---------------------------------------------------------------- boxes, sources, figures
def as_callout(quotation):
    "A quotation whose first line is bold, as a callout; any other stays."
    named = BOX.match(quotation)
    if not named:
        return quotation
    lines = [re.sub(r"^> ?", "", line) for line in quotation[named.end() :].splitlines()]
    text = "\n".join([named[2], *lines]).strip("\n")
    title = named[1].replace('"', "'")
    return f'::: {{.callout-note title="{title}"}}\n\n{text}\n\n:::'


def boxes(cell):
    "Quotations that begin with a bold line become callouts."
    if cell.cell_type != "markdown":
        return

    def change(part):
        return QUOTATION.sub(lambda m: as_callout(m[0]), part)

    cell.source = outside_fences(cell.source, change)


class citations(Processor):
    "Links to the page of references become citations; the page's sources stand at its end."

    def begin(self):
        self.keys = {}
        self.own = Path(self.nb.path_).name == REFERENCES

    def cell(self, cell):
        if cell.cell_type == "markdown" and not self.own:
            cell.source = outside_code(cell.source, lambda part: CITED.sub(self.link, part))

    def link(self, found):
        self.keys[found[2]] = True
        return f"[{found[1]}](#ref-{found[2]})"

    def end(self):
        known = sources()
        named = sorted((as_text(known[key]), key) for key in self.keys if key in known)
        if named:
            listed = [f"::: {{#ref-{key} .source}}\n{text}\n:::" for text, key in named]
            text = "\n\n".join(["## Sources {.unnumbered}", *listed])
            self.nb.cells.append(mk_cell(text, "markdown"))


def figures(cell):
    "A reference to a figure of the page becomes a numbered one."
    if cell.cell_type == "markdown":
        cell.source = outside_code(cell.source, lambda part: FIGURE.sub(r"@\1", part))


# ---------------------------------------------------------------- cells and what they store
def only_sets_up(source):
    "Whether a cell holds imports and calls of `set_up`, no more."
    try:
        lines = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(lines) and all(
        isinstance(line, ast.Import | ast.ImportFrom)
        or isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Call)
        and getattr(line.value.func, "id", "") == "set_up"
        for line in lines
    )


class fold(Processor):
    "Imports, set-up and drawings stand folded on the site; what follows one another is one fold."

    def cell(self, cell):
        if cell.cell_type != "code":
            return
        given = options(cell.source)
        if "code-fold" not in given and only_sets_up(cell.source):
            cell.folded = True
            cell.source = f"{SETS_UP}\n{cell.source}"
        elif given.get("code-fold") == "true" and "code-summary" not in given:
            cell.source = f'#| code-summary: "Code of the drawing"\n{cell.source}'

    def end(self):
        kept = []
        for cell in self.nb.cells:
            last = kept[-1] if kept else {}
            if cell.pop("folded", False) and last.get("source", "").startswith(SETS_UP):
                last.source += "\n\n" + cell.source.removeprefix(SETS_UP).strip("\n")
                last["outputs"] += cell.get("outputs", [])
            else:
                kept.append(cell)
        self.nb.cells = kept


def is_caption(output, caption):
    "Whether an output only repeats the cell's caption, which the site sets itself."
    text = joined(output.get("data", {}).get("text/markdown", ""))
    plain = re.sub(r"^\*\*Figure\.?\*\*\s*", "", text.strip())
    plain = re.sub(r"^\*(.*)\*$", r"\1", plain, flags=re.S)
    strip = re.compile(r"\\(?=[^\w\s])|\s+|\"|'")
    return bool(plain) and strip.sub("", plain) == strip.sub("", caption)


def without_noise(output):
    "An output without bars and what a kernel says of itself; None where nothing is left."
    if output.get("output_type") != "stream":
        return output
    lines = re.split(r"(?<=\n)", re.sub(r"[^\n]*\r(?!\n)", "", joined(output["text"])))
    text = "".join(line for line in lines if not NOISE.search(line))
    if not text.strip():
        return None
    output["text"] = text
    return output


def tidy(cell):
    "Stored captions, progress bars and lines of the kernel go."
    if cell.cell_type != "code":
        return
    caption = options(cell.source).get("fig-cap", "")
    kept = [o for o in cell.get("outputs", []) if not (caption and is_caption(o, caption))]
    cell["outputs"] = [o for o in map(without_noise, kept) if o is not None]


class widgets(Processor):
    "A widget needs a kernel: on the site it and its state go, so that nothing is loaded for it."

    def begin(self):
        self.nb.metadata.pop("widgets", None)

    def cell(self, cell):
        if cell.cell_type == "code":
            cell["outputs"] = [
                o
                for o in cell.get("outputs", [])
                if not any("widget" in kind for kind in o.get("data", {}))
            ]


# ---------------------------------------------------------------- what a name offers
NAMED = re.compile(r"^show_doc\(([\w.]+)", re.M)


def found_in(nb, name):
    "An object by its dotted name, in the module that the chapter exports."
    module = importlib.import_module(f"{get_config().lib_name}.{nb.default_exp_}")
    symbol = module
    for part in name.split("."):
        symbol = vars(symbol)[part] if part in vars(symbol) else getattr(symbol, part)
    return symbol


class documentation(Processor):
    """Each exported name once, behind its code, in the order of the code.

    nbdev would run a chapter's imports and exports for this; the exported module has the same
    objects.
    """

    def begin(self):
        self.nb.default_exp_ = self.module()
        cells = self.nb.cells
        place = 0
        while place < len(cells):
            end = place
            while end < len(cells) and self.is_entry(cells[end]):
                end += 1
            run = cells[place:end]
            made = [c for c in run if getattr(c, "has_sd", False)]
            rest = [c for c in run if not getattr(c, "has_sd", False)]
            cells[place:end] = [*made[::-1], *rest]  # nbdev puts the last name first
            place = end + 1

    def module(self):
        "What `#| default_exp` names; its cell is hidden, so the path says it."
        return ".".join(place_of(self.nb).with_suffix("").parts)

    def is_entry(self, cell):
        return cell.cell_type == "code" and bool(NAMED.search(cell.source or ""))

    def cell(self, cell):
        if not self.is_entry(cell):
            return
        entries = [
            show_doc(found_in(self.nb, name), name=name) for name in NAMED.findall(cell.source)
        ]
        text = "\n\n".join(f"::: {{.api}}\n\n{e._repr_markdown_()}\n\n:::" for e in entries)
        cell.cell_type = "markdown"
        for key in ("outputs", "execution_count"):
            cell.pop(key, None)
        cell.source = text


OWN_LINK = re.compile(r"\[(`[^`\n]+`)\]\((https?://[^)\s]+\.html#([\w.]+))\)")


def unlink(cell):
    "nbdev links names that only modules share, which no page shows: they are code, no links."

    def change(found):
        inside = found[2].startswith(own_site()) and "." not in found[3]
        return found[1] if inside and not documented(found[2]) else found[0]

    if cell.cell_type == "markdown":
        cell.source = OWN_LINK.sub(change, cell.source)


# ---------------------------------------------------------------- open it elsewhere
def open_links(place):
    "(name, address) of the services that run a chapter without an installation."
    config = get_config()
    repository = config.git_url.removeprefix("https://github.com/").strip("/")
    page = f"{config.nbs_path.name}/{place}"
    return [
        ("Colab", f"https://colab.research.google.com/github/{repository}/blob/colab/{page}"),
        (
            "Binder",
            f"https://mybinder.org/v2/gh/{repository}/{config.branch}?urlpath=lab/tree/{page}",
        ),
        ("Source", f"{config.git_url}/blob/{config.branch}/{page}"),
    ]


class badges(Processor):
    "Under the title: where a chapter can be opened and run."

    def begin(self):
        line = " ".join(f"[{name}]({link})" for name, link in open_links(place_of(self.nb)))
        at = 1 if self.nb.cells and self.nb.cells[0].cell_type == "raw" else 0
        self.nb.cells.insert(at, mk_cell(f"::: {{.badges}}\n{line}\n:::", "markdown"))


# ---------------------------------------------------------------- and go on reading
def title_of(chapter):
    "The title in a chapter's first cell."
    nb = json.loads((get_config().nbs_path / chapter).read_text(encoding="utf-8"))
    named = re.match(r"# (.+)", joined(nb["cells"][0]["source"]))
    return named[1].strip() if named else chapter


class onward(Processor):
    "At the end of a chapter of the main path: the next one."

    def begin(self):
        place = place_of(self.nb)
        _, after = neighbours(place.as_posix(), main_path())
        if after:
            target = relpath(after, place.parent.as_posix())
            text = f"::: {{.onward}}\nNext on the main path: [{title_of(after)}]({target})\n:::"
            self.nb.cells.append(mk_cell(text, "markdown"))
