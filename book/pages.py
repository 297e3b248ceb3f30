"""One prepared notebook as an HTML page: Markdown for pandoc, cell by cell, and what pandoc says.

The marks (`.cell`, `.cell-output`, `.callout-note`, `code-fold`) are Quarto's, so that both use the
same styles; labels of figures are numbered here as Quarto does.
"""

import base64
import html
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from book.text import joined, options, outside_code, without_options

KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section", "lst": "Listing"}
REFERENCE = re.compile(r"(?<![\w`/])@((?:fig|tbl|eq|sec|lst)-[\w-]*\w)")
SUFFIX = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpeg"}
CALLOUT = re.compile(r'^::: \{\.callout-(\w+)(?: title="([^"]*)")?[^}]*\}$', re.M)
SPLIT = "<!-- the page's own text -->"
FENCE = "`" * 7


@dataclass
class Page:
    "What rendering one chapter gives."

    name: str  # path below nbs/
    title: str = ""
    description: str = ""
    body: str = ""
    contents: str = ""
    complaints: list = field(default_factory=list)


@cache
def pandoc():
    "The path of pandoc, which pypandoc_binary brings."
    import pypandoc

    return pypandoc.get_pandoc_path()


# ---------------------------------------------------------------- outputs
def figure(output, given, file, folder):
    "A picture as a figure of the page; it is written to `folder`/`file`."
    kind = next(k for k in SUFFIX if k in output["data"])
    data = joined(output["data"][kind])
    path = folder / f"{file}.{SUFFIX[kind]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if kind == "image/svg+xml" else base64.b64decode(data))
    size = output.get("metadata", {}).get(kind, {})
    width = f' width="{size["width"]}"' if size.get("width") else ""
    alternative = html.escape(given.get("fig-alt", ""))
    image = f'<img src="{path.parent.name}/{path.name}" alt="{alternative}"{width}>'
    return captioned(image, given)


def captioned(body, given):
    "A picture, or sliders with their pictures, as a figure with its anchor, number and caption."
    label = given.get("label", "")
    opened = f'<figure id="{label}">' if label.startswith("fig-") else "<figure>"
    if not given.get("fig-cap"):
        return f"{opened}\n{body}\n</figure>"
    number = f"[@@{label}@@]{{.figure-number}} " if label.startswith("fig-") else ""
    caption = f"<figcaption>\n\n{number}{given['fig-cap']}\n\n</figcaption>"
    return f"{opened}\n{body}\n{caption}\n</figure>"


def output_markdown(output, given, file, folder):
    "One output of a cell as Markdown."
    data = output.get("data", {})
    if any(k in data for k in SUFFIX):
        return figure(output, given, file, folder)
    if "text/markdown" in data:
        text = joined(data["text/markdown"])
        return f":::: {{.cell-output .cell-output-markdown}}\n\n{text}\n\n::::"
    if "text/html" in data and given.get("output") != "asis":
        block = f"\n{FENCE}{{=html}}\n{joined(data['text/html'])}\n{FENCE}\n"
        return captioned(block, given) if given.get("label") else block
    text = joined(output.get("text", data.get("text/plain", "")))
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    if given.get("output") == "asis" or not text.strip():
        return text
    kind = output.get("name", "display")
    return f":::: {{.cell-output .cell-output-{kind}}}\n{FENCE}\n{text}\n{FENCE}\n::::"


def code_markdown(source, given):
    "The code of a cell, folded where its options say so."
    code = without_options(source)
    if not code.strip() or given.get("echo") == "false":
        return ""
    block = f"{FENCE} {{.python .cell-code}}\n{code}\n{FENCE}"
    if given.get("code-fold") != "true":
        return block
    summary = html.escape(given.get("code-summary", "Code"))
    return f'<details class="code-fold">\n<summary>{summary}</summary>\n\n{block}\n\n</details>'


def cell_markdown(cell, file, folder, complaints):
    "One cell as Markdown, by its `#|` options."
    if cell["cell_type"] == "raw":
        return ""
    source = joined(cell["source"])
    if cell["cell_type"] != "code":
        return source
    given = options(source)
    if given.get("include") == "false":
        return ""
    outputs = cell["outputs"] if given.get("output") != "false" else []
    pictures = [o for o in outputs if any(k in o.get("data", {}) for k in SUFFIX)]
    for key in ("label", "fig-cap", "fig-alt"):
        if pictures and not given.get(key):
            complaints.append(f"cell {file}: a picture without `#| {key}`")
    if len(pictures) > 1:
        complaints.append(f"cell {file}: {len(pictures)} pictures under one caption")
    parts = [code_markdown(source, given)]
    parts += [output_markdown(o, given, f"{file}-{i}", folder) for i, o in enumerate(outputs)]
    text = "\n\n".join(p for p in parts if p)
    return f"::::: {{.cell}}\n\n{text}\n\n:::::" if text else ""


# ---------------------------------------------------------------- a page
def numbered(text, complaints):
    "Number the labels of a page; each @fig-x becomes a link with its number."
    numbers = {}
    marked = re.findall(r'(?:<figure id="|\{[^}\n]*#)((?:fig|tbl|eq|sec|lst)-[\w-]+)', text)
    for label in dict.fromkeys(marked):
        kind = label.split("-")[0]
        same = sum(other.split("-")[0] == kind for other in numbers)
        numbers[label] = f"{KINDS[kind]} {same + 1}"
        if marked.count(label) > 1:
            complaints.append(f"label {label} stands twice")

    def link(found):
        if found[1] not in numbers:
            complaints.append(f"reference @{found[1]} has no target on its page")
        return f"[{numbers.get(found[1], '?')}](#{found[1]})"

    def change(part):
        part = re.sub(r"@@((?:fig)-[\w-]+)@@", lambda m: f"{numbers[m[1]]}.", part)
        part = re.sub(
            r"!\[([^\]]+)\](\([^)]+\)\{[^}\n]*#(fig-[\w-]+))",
            lambda m: f"![[{numbers[m[3]]}.]{{.figure-number}} {m[1]}]{m[2]}",
            part,
        )
        part = re.sub(r"\[?" + REFERENCE.pattern + r"\]?", link, part)
        return re.sub(r"(\$\$)\s*\{(#eq-[\w-]+)\}", r"\1 []{\2}", part)

    return outside_code(text, change)


def head_of(nb):
    "Title and description that nbdev wrote into the first cell."
    import yaml

    first = nb["cells"][0] if nb["cells"] else {}
    if first.get("cell_type") != "raw":
        return {}
    return yaml.safe_load(joined(first["source"]).strip().strip("-")) or {}


def markdown_of(nb, page, folder):
    "The whole page as Markdown for pandoc; its pictures are written beside it."
    stem = Path(page.name).stem
    pictures = folder / Path(page.name).parent / f"{stem}_files"
    cells = [
        cell_markdown(cell, f"{stem}-{i}", pictures, page.complaints)
        for i, cell in enumerate(nb["cells"])
    ]
    text = numbered("\n\n".join(c for c in cells if c), page.complaints)

    def opened(found):
        title = found[2] or found[1].capitalize()
        return f"::: {{.callout .callout-{found[1]}}}\n\n[{title}]{{.callout-title}}\n"

    return CALLOUT.sub(opened, text)


def render(nb, name, folder):
    "Render one prepared notebook into a Page; its pictures go to `folder`."
    page = Page(str(name))
    head = head_of(nb)
    page.title = str(head.get("title", Path(name).stem))
    page.description = str(head.get("description", ""))
    text = markdown_of(nb, page, folder)
    template = Path(__file__).parent / "fragment.html"
    command = [pandoc(), "-f", "markdown", "-t", "html5", "--mathml", "--toc", "--toc-depth=3"]
    command += ["--standalone", f"--template={template}", "--columns=10000", "--wrap=preserve"]
    command += ["-M", "lang=en-GB", "-M", "title=page"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, encoding="utf-8")
    page.complaints += [f"pandoc: {line}" for line in done.stderr.strip().splitlines()]
    page.contents, _, body = done.stdout.partition(SPLIT)
    page.body = slim(body)
    return page


LONG = 40  # letters of TeX: a longer formula in a line may need a box that scrolls on a phone


def boxed(found):
    "A formula in a line, in a box if it is long."
    formula = re.search(r"<annotation[^>]*>(.*?)</annotation>", found[0], flags=re.S)
    long = formula and len(formula[1]) > LONG
    return f'<span class="long-math">{found[0]}</span>' if long else found[0]


def slim(body):
    "pandoc's HTML without its marks of lines, and with alternatives where HTML has them."
    body = re.sub(r'<a href="#cb\d+-\d+" aria-hidden="true" tabindex="-1"></a>', "", body)
    body = re.sub(r'<span id="cb\d+-\d+">', "<span>", body)
    body = re.sub(r' id="cb\d+"', "", body)
    body = re.sub(r'<math display="inline".*?</math>', boxed, body, flags=re.S)
    body = re.sub(r'(<img [^>]*?)alt="[^"]*"([^>]*?) data-fig-alt="([^"]*)"', r'\1alt="\3"\2', body)
    return re.sub(
        r'(<img [^>]*?) data-fig-alt="([^"]*)"([^>]*?)alt="[^"]*"', r'\1 alt="\2"\3', body
    )
