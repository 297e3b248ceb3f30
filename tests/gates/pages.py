"""Gate: every notebook becomes a web page without a warning, and everything that a page points at
is there.

nbdev prepares the notebooks as it does for Quarto; then pandoc, Quarto's engine, renders them.
Quarto's own additions (cell options, cross-references) are imitated below, as far as this book uses
them.
"""

import base64
import contextlib
import html.parser
import os
import re
import subprocess
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import nbdev.doclinks
from common import directives, finish, notebooks, read, scratch, without_directives
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import exec_nb
from readme import outside_fences

KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section", "lst": "Listing"}
LABEL = re.compile(r"#((?:fig|tbl|eq|sec|lst)-[\w-]+)")
REFERENCE = re.compile(r"(?<![\w`/])@((?:fig|tbl|eq|sec|lst)-[\w-]*\w)")


def as_markdown(output, options, name, folder):
    "One output of a cell as Markdown; pictures are written to `folder`."
    data = {k: "".join(v) if isinstance(v, list) else v for k, v in output.get("data", {}).items()}
    picture = next((k for k in ("image/png", "image/svg+xml", "image/jpeg") if k in data), None)
    if picture:
        file = folder / f"{name}.{picture.split('/')[1].split('+')[0]}"
        file.write_bytes(
            data[picture].encode() if "svg" in picture else base64.b64decode(data[picture])
        )
        label = f"#{options['label']} " if options.get("label", "").startswith("fig-") else ""
        caption, alternative = (options.get(key, "") for key in ("fig-cap", "fig-alt"))
        return f'![{caption}]({file.name}){{{label}fig-alt="{alternative}"}}'
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/html" in data and options.get("output") != "asis":
        return f"```{{=html}}\n{data['text/html']}\n```"
    text = re.sub(r"\x1b\[[0-9;]*m", "", "".join(output.get("text", data.get("text/plain", ""))))
    if options.get("output") == "asis":
        return text
    return f"```````\n{text.rstrip()}\n```````" if text.strip() else ""


def cell_markdown(cell, name, folder, complaints):
    "One cell as Markdown, by its `#|` options."
    if cell["cell_type"] != "code":
        return cell["source"]
    options = directives(cell["source"])
    if options.get("include") == "false":
        return ""
    code = without_directives(cell["source"])
    parts = [f"```````python\n{code}\n```````"] if code and options.get("echo") != "false" else []
    outputs = cell["outputs"] if options.get("output") != "false" else []
    pictures = [o for o in outputs if any(k.startswith("image/") for k in o.get("data", {}))]
    if pictures:
        for key in ("label", "fig-cap", "fig-alt"):
            if not options.get(key):
                complaints.append(f"cell {name}: a picture without `#| {key}`")
        if len(pictures) > 1:
            complaints.append(f"cell {name}: {len(pictures)} pictures under one caption")
    parts += [as_markdown(o, options, f"{name}-{i}", folder) for i, o in enumerate(outputs)]
    return "\n\n".join(p for p in parts if p)


def resolve(text, complaints):
    "Number the labels of a page and turn each @fig-x into a link to it."
    numbers = {}
    labels = LABEL.findall(text)
    for label in dict.fromkeys(labels):
        kind = label.split("-")[0]
        numbers[label] = (
            f"{KINDS[kind]} {sum(other.split('-')[0] == kind for other in numbers) + 1}"
        )
        if len(re.findall(rf"\{{[^}}]*#{re.escape(label)}[ }}]", text)) > 1:
            complaints.append(f"label {label} stands twice")

    def link(m):
        if m[1] not in numbers:
            complaints.append(f"reference @{m[1]} has no target on its page")
        return f"[{numbers.get(m[1], '?')}](#{m[1]})"

    def change(part):
        pieces = re.split(r"(`[^`\n]+`)", part)
        return "".join(
            p
            if p.startswith("`")
            else re.sub(
                r"(\$\$)\s*\{(#eq-[\w-]+)\}",
                r"\1 []{\2}",
                re.sub(r"\[?" + REFERENCE.pattern + r"\]?", link, p),
            )
            for p in pieces
        )

    return outside_fences(text, change)


class Links(html.parser.HTMLParser):
    "Collects the ids and the links of a page."

    def __init__(self):
        super().__init__()
        self.ids = set()
        self.links = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for key in ("id", "name"):
            if attrs.get(key):
                self.ids.add(attrs[key])
        for key in ("href", "src"):
            if attrs.get(key):
                self.links.append(attrs[key])


def render(source, tree, pandoc):
    "Render one prepared notebook. Returns (its Links, complaints)."
    complaints = []
    target = source.with_suffix(".html")
    pages = [
        cell_markdown(c, f"{source.stem}-{i}", source.parent, complaints)
        for i, c in enumerate(read(source)["cells"])
    ]
    text = resolve("\n\n".join(p for p in pages if p), complaints)
    command = [
        pandoc,
        "-f",
        "markdown",
        "-t",
        "html5",
        "--standalone",
        "--mathml",
        "--citeproc",
        "--toc",
        "--bibliography",
        str(tree / "nbs/references.bib"),
        "-M",
        "lang=en-GB",
        "-M",
        "link-citations=true",
        "-o",
        str(target),
    ]
    done = subprocess.run(command, input=text, text=True, capture_output=True, cwd=source.parent)
    complaints += [f"pandoc: {line}" for line in done.stderr.strip().splitlines()]
    found = Links()
    if target.exists():
        found.feed(target.read_text())
    return found, complaints


def broken(page, links, pages, tree, site):
    "The links of a page that lead nowhere; other people's sites are not asked."
    for link in dict.fromkeys(links.links):
        if link.startswith(site):  # nbdev writes links to our own pages in full
            path, _, anchor = link[len(site) :].strip("/").partition("#")
            goal = next(
                (
                    p
                    for p in pages
                    if re.sub(r"(^|/)\d+[a-z]?_", r"\1", str(p.with_suffix(".html")))
                    == re.sub(r"(^|/)\d+[a-z]?_", r"\1", path)
                ),
                None,
            )
            if goal is None:
                yield f"{link}: no such page"
            elif anchor and anchor not in pages[goal].ids:
                yield f"{link}: no such heading"
            continue
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        goal = os.path.normpath(page.parent / path) if path else str(page)
        if goal.startswith(".."):
            yield f"{link}: leaves the site"
        elif path and not (tree / "_proc" / goal).exists() and not (tree / "nbs" / goal).exists():
            yield f"{link}: no such file"
        elif anchor and (known := pages.get(Path(goal))) and anchor not in known.ids:
            yield f"{link}: no such heading or label"


def prepare(source, target):
    """nbdev's own preparation of one notebook for Quarto: links to symbols, tables of arguments.
    Returns a complaint or None.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            exec_nb(source, target, FilterDefaults)
    except Exception as e:
        cause = f"{type(e.__cause__).__name__}: {e.__cause__}" if e.__cause__ else ""
        return (
            "nbdev cannot prepare it for the site: "
            + " / ".join(str(e).splitlines()[:4])
            + f" ... {cause} (building the site runs cells that import or export, "
            "and makes a table for each exported name)"
        )
    if any("imports and other code" in str(w.message) for w in said):
        return "an import stands in a cell with other code: building the site would run that code"


def main():
    import pypandoc
    from config import settings

    start = time.time()
    ini = settings()
    site = ini["doc_host"] % ini + ini["doc_baseurl"] % ini
    with scratch() as tree, contextlib.chdir(tree):
        os.environ["IN_TEST"] = "1"
        nbdev.doclinks._build_modidx()
        names = [p.relative_to(tree / "nbs") for p in notebooks(tree)]
        found = [f"{n}: {c}" for n in names if (c := prepare(tree / "nbs" / n, tree / "_proc" / n))]
        there = [n for n in names if (tree / "_proc" / n).exists()]
        with ThreadPoolExecutor(2) as pool:
            done = list(
                pool.map(
                    lambda n: render(tree / "_proc" / n, tree, pypandoc.get_pandoc_path()), there
                )
            )
        pages = {n: links for n, (links, _) in zip(there, done)}
        for n, (links, complaints) in zip(there, done):
            found += [f"{n}: {c}" for c in [*complaints, *broken(n, links, pages, tree, site)]]
    finish(
        "pages",
        found,
        f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links",
        start,
    )


if __name__ == "__main__":
    main()
