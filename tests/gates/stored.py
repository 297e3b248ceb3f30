"""What a chapter stores against what it says now: the same text, but for what a machine's speed
decides.

Pictures are only counted, sliders and what goes to stderr (bars, warnings) are left out. What
counts as measured stands in `MEASURED`; a cell in which every number is measured says so with
`#| measured` at its top.
"""

import difflib
import re

NUMBER = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?"
UNIT = r"(?:ns|us|µs|ms|s|min|seconds?|minutes?|[kMG]i?B peak|\w+ (?:a|per) second|\w+/s)"
MEASURED = [  # what another run may say otherwise, and what stands for it
    (rf" *{NUMBER} ?{UNIT}(?!\w)", " MEASURED"),
    (rf" *{NUMBER} (?:times|x) (?=as fast|as long|faster|slower)", " MEASURED times "),
    (r"data:image/png;base64,[^\"]+", "PICTURE"),
    (r"0x[0-9a-f]{6,}", "ADDRESS"),
    (r"/tmp/\w+", "FOLDER"),
]


def settled(text, measured=False):
    "A text without what was measured; where all of it was, without any number."
    for pattern, instead in MEASURED + [(rf" *{NUMBER}", " MEASURED")] * measured:
        text = re.sub(pattern, instead, text)
    if "MEASURED" in text:  # and the column of a table may be wider
        text = re.sub(r"-{3,}", "---", re.sub(r" {2,}", " ", text))
    return text.rstrip()


def shown(outputs, measured=False):
    "What a reader sees of a cell: (what it prints, its values in order, how many pictures)."
    printed = ""
    values = []
    pictures = 0
    for out in outputs:
        data = out.get("data", {})
        if out.get("name") == "stdout":
            printed += "".join(out["text"])
        elif any("widget" in kind for kind in data):  # a slider, and the picture under it
            return "", [], 0
        elif any(kind.startswith("image/") for kind in data):
            pictures += 1
        elif data:
            kind = next(k for k in ("text/markdown", "text/html", "text/plain", *data) if k in data)
            values.append(settled("".join(data[kind]), measured))
    captions = [v for v in values if v.startswith("*") and v.endswith("*")]
    values = [v for v in values if v not in captions] + captions  # Jupyter shows them last
    return settled(printed, measured), values, pictures


def difference(old, new, measured=False):
    "The first lines in which stored and fresh outputs of a cell differ, or None."
    (printed, values, pictures) = shown(old, measured)
    fresh = shown(new, measured)
    if (printed, values, pictures) == fresh:
        return None
    if pictures != fresh[2]:
        return f"stores {pictures} pictures, draws {fresh[2]}"
    before, after = (
        "\n".join([text, *rest]).splitlines() for text, rest in ((printed, values), fresh[:2])
    )
    lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[3:7]
    return "stores another text than it gives now:\n      " + "\n      ".join(
        line[:160] for line in lines
    )
