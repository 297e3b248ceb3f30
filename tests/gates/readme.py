"""README.md and the pictures on it from nbs/index.ipynb, without Quarto:
`python tests/gates/readme.py --write`.
"""

import base64
import re
import sys

from common import ROOT, read
from config import settings

from book.pages import SUFFIX
from book.text import options, outside_fences, without_options

HEAD = (
    "<!-- Written by tests/gates/readme.py from nbs/index.ipynb. "
    "Edit that notebook, then run `make prepare`. -->\n"
)
# the target of a Markdown link or image that is relative: not a URL, not an anchor, not an address
# with a scheme
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)\s]+)(?=[)\s])")
PICTURE = re.compile(r"\.(?:png|jpe?g|gif|svg|webp)$", re.I)


def as_text(outputs):
    "The text of a cell's outputs; a picture belongs in nbs/images/, with a Markdown link."
    for out in outputs:
        data = out.get("data", {})
        if any(k.startswith("image/") for k in data):
            raise SystemExit(
                "nbs/index.ipynb stores a picture in an output: "
                "put it into nbs/images/ and link to it"
            )
        text = "".join(
            out.get("text", data.get("text/markdown", data.get("text/plain", "")))
        ).rstrip()
        if text:
            yield text if "text/markdown" in data else f"```\n{text}\n```"


def in_full(target):
    "The address of a file below nbs/: README.md is also a page of the package index, far from it."
    ini = settings()
    site = ini["git_url"] % ini
    branch = ini["branch"]
    raw = site.replace("github.com", "raw.githubusercontent.com")
    place = f"{raw}/{branch}" if PICTURE.search(target) else f"{site}/blob/{branch}"
    return f"{place}/nbs/{target}"


def render(root=ROOT):
    "The Markdown of README.md."
    blocks = []
    for cell in read(root / "nbs/index.ipynb")["cells"]:
        source = cell["source"].strip()
        if cell["cell_type"] == "markdown":
            source = outside_fences(source, lambda t: LINK.sub(lambda m: m[1] + in_full(m[2]), t))
            blocks.append(re.sub(r" *\{(?:#|\.|fig-alt=|width=)[^}\n]*\}", "", source))
        elif cell["cell_type"] == "code" and source and "hide" not in (given := options(source)):
            code = without_options(source)
            if code and given.get("echo") != "false":
                blocks.append(f"```python\n{code}\n```")
            blocks += as_text(cell["outputs"])
    return HEAD + "\n" + "\n\n".join(b for b in blocks if b) + "\n"


SOCIAL = (1200, 630)  # what social.png measures, px


def pictures(root=ROOT):
    "What the first page shows, from the stored outputs of nbs/index.ipynb: path -> bytes."
    found = {}
    for cell in read(root / "nbs/index.ipynb")["cells"]:
        name = options(cell["source"]).get("label", "").removeprefix("fig-")
        for out in cell.get("outputs", []):
            data = {k: "".join(v) for k, v in out.get("data", {}).items() if k in SUFFIX}
            for kind, text in data.items():
                file = text.encode() if kind == "image/svg+xml" else base64.b64decode(text)
                found[root / f"nbs/images/{name}.{SUFFIX[kind]}"] = file
    return found


def stale_pictures(root=ROOT):
    "The first page's pictures are those that its notebook draws; the social one has its size."
    for path, file in pictures(root).items():
        if not path.exists() or path.read_bytes() != file:
            yield f"{path.name} is not what nbs/index.ipynb draws: run `make prepare`"
    social = root / "nbs/images/social.png"
    if not social.exists():
        yield "nbs/images/social.png is missing: call `draw_social` of nbs/index.ipynb"
    else:
        head = social.read_bytes()[16:24]  # width and height of a PNG
        size = tuple(int.from_bytes(head[i : i + 4], "big") for i in (0, 4))
        if size != SOCIAL:
            yield f"nbs/images/social.png is {size[0]} x {size[1]}: it must be 1200 x 630"


if __name__ == "__main__":
    if "--write" in sys.argv:
        for path, file in pictures().items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(file)
        (ROOT / "README.md").write_text(render())
    else:
        print(render(), end="")
