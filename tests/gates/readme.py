"""README.md from nbs/index.ipynb, without Quarto: `python tests/gates/readme.py --write`."""
import re, sys

from common import ROOT, directives, read

HEAD = "<!-- Written by tests/gates/readme.py from nbs/index.ipynb. Edit that notebook, then run `make prepare`. -->\n"
# the target of a Markdown link or image that is relative: not a URL, not an anchor, not an address with a scheme
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)\s]+)(?=[)\s])")


def outside_fences(text, change):
    "Apply `change` to the parts of Markdown that are not fenced code."
    parts = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.M | re.S)
    return "".join(p if p.startswith("```") else change(p) for p in parts)


def as_text(outputs):
    "The text of a cell's outputs; a picture belongs in nbs/images/, with a Markdown link."
    for out in outputs:
        data = out.get("data", {})
        if any(k.startswith("image/") for k in data): raise SystemExit("nbs/index.ipynb stores a picture in an output: put it into nbs/images/ and link to it")
        text = "".join(out.get("text", data.get("text/markdown", data.get("text/plain", "")))).rstrip()
        if text: yield text if "text/markdown" in data else f"```\n{text}\n```"


def render(root=ROOT):
    "The Markdown of README.md."
    blocks = []
    for cell in read(root / "nbs/index.ipynb")["cells"]:
        source = cell["source"].strip()
        if cell["cell_type"] == "markdown":
            source = outside_fences(source, lambda t: LINK.sub(r"\1nbs/\2", t))
            blocks.append(re.sub(r" *\{(?:#|\.|fig-alt=|width=)[^}\n]*\}", "", source))
        elif cell["cell_type"] == "code" and source and "hide" not in (options := directives(source)):
            code = "\n".join(l for l in source.splitlines() if not l.startswith("#|")).strip()
            if code and options.get("echo") != "false": blocks.append(f"```python\n{code}\n```")
            blocks += as_text(cell["outputs"])
    return HEAD + "\n" + "\n\n".join(b for b in blocks if b) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv: (ROOT / "README.md").write_text(render())
    else: print(render(), end="")
