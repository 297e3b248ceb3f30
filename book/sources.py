"""The project's list of sources: nbs/references.bib as text, and as the chapter of references."""

import re
import unicodedata
from functools import cache

from nbdev.config import get_config

ENTRY = re.compile(r"@(\w+)\{([^,\s]+),(.*?)\n\}", re.S)
FIELD = re.compile(r"^\s*(\w+)\s*=\s*\{(.*?)\},?\s*$", re.M | re.S)
ACCENTS = {"\\'": "\u0301", '\\"': "\u0308", "\\`": "\u0300", "\\c": "\u0327", "\\~": "\u0303"}
ACCENT = re.compile(r"(\\['\"`~]|\\c(?![a-z]))\{?\s*([A-Za-z])\}?")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def plain(value):
    "A BibTeX value without braces, its accents as letters."
    value = ACCENT.sub(lambda m: unicodedata.normalize("NFC", m[2] + ACCENTS[m[1]]), value)
    return re.sub(r"[{}]", "", value)


def read_bib(text):
    "{key: {field: value}} of a BibTeX file in the plain form that ours has."
    found = {}
    for kind, key, body in ENTRY.findall(text):
        fields = {name.lower(): plain(value) for name, value in FIELD.findall(body)}
        found[key] = {"kind": kind.lower(), **fields}
    return found


@cache
def sources():
    "The entries of nbs/references.bib."
    return read_bib((get_config().nbs_path / "references.bib").read_text(encoding="utf-8"))


def authors(names):
    "`Poles, Isabella and D'Arnese, Eleonora` as `Poles, I. and D'Arnese, E.`"
    short = []
    for name in re.split(r"\s+and\s+", names):
        family, _, given = name.partition(",")
        initials = "".join(f" {part[0]}." for part in re.split(r"[\s-]+", given.strip()) if part)
        short.append(f"{family.strip()},{initials}" if initials else family.strip())
    return ", ".join(short[:-1]) + (" and " if len(short) > 1 else "") + short[-1]


def as_text(entry):
    "One entry as Markdown."
    place = entry.get("journal") or entry.get("booktitle") or entry.get("publisher", "")
    volume = entry.get("volume", "") + (f"({entry['number']})" if entry.get("number") else "")
    pages = entry.get("pages", "").replace("--", "–")
    where = ", ".join(part for part in (place, volume, pages) if part)
    link = f"https://doi.org/{entry['doi']}" if entry.get("doi") else entry.get("url", "")
    if not link and (found := ARXIV.search(place)):
        link = f"https://arxiv.org/abs/{found[1]}"
    title = f"[*{entry['title']}*]({link})" if link else f"*{entry['title']}*"
    said = f"{authors(entry['author'])} ({entry['year']}). {title}. {where}"
    return said.rstrip(". ") + "."
