"""Texts of notebooks: Markdown without its code, cells without their options."""

import re
from itertools import dropwhile

FENCED = re.compile(r"(^```.*?^```[^\n]*$)", re.M | re.S)


def joined(text):
    "A notebook writes a text as one string or as a list of lines."
    return text if isinstance(text, str) else "".join(text)


def outside_fences(text, change):
    "Apply `change` to the parts of Markdown that are not fenced code."
    return "".join(p if p.startswith("```") else change(p) for p in FENCED.split(text))


def outside_code(text, change):
    "Apply `change` to the parts of Markdown that are no code, fenced or inline."

    def prose(part):
        pieces = re.split(r"(`[^`\n]+`)", part)
        return "".join(p if p.startswith("`") else change(p) for p in pieces)

    return outside_fences(text, prose)


def options(source):
    "The `#| key: value` lines at the top of a code cell; of `#| default_exp core` the first word."
    found = {}
    for line in source.splitlines():
        if not line.startswith("#|"):
            break
        key, _, value = line[2:].strip().partition(":")
        if key.strip():
            found[key.split()[0]] = value.strip().strip("\"'")
    return found


def without_options(source):
    "A cell's code without the `#|` lines at its top."
    lines = dropwhile(lambda line: line.startswith("#|"), source.splitlines())
    return "\n".join(lines).strip("\n")
