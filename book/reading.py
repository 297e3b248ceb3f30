"""The order of reading: nbs/sidebar.yml, its sections, its chapters, and the main path."""

from functools import cache

import yaml
from nbdev.config import get_config


@cache
def sidebar():
    "nbs/sidebar.yml as data."
    return yaml.safe_load((get_config().nbs_path / "sidebar.yml").read_text(encoding="utf-8"))


def there(chapter):
    "Whether a chapter exists."
    return (get_config().nbs_path / chapter).exists()


def entries(contents=None):
    "The sidebar as nested lists: a chapter is its path, a section (its name, its entries)."
    if contents is None:
        contents = sidebar()["website"]["sidebar"]["contents"]
    return [
        e if isinstance(e, str) else (e["section"], entries(e["contents"]))
        for e in contents
        if not isinstance(e, str) or there(e)
    ]


def flat(found):
    "The chapters of nested entries, in order."
    for entry in found:
        if isinstance(entry, str):
            yield entry
        else:
            yield from flat(entry[1])


def order():
    "All chapters in the order of reading."
    return list(flat(entries()))


def main_path():
    "The chapters that a first reader takes, in order."
    return [chapter for chapter in sidebar().get("main-path", []) if there(chapter)]


def neighbours(name, names):
    "(the one before, the one after) in a list of names; None where there is none."
    if name not in names:
        return None, None
    at = names.index(name)
    return (names[at - 1] if at else None), (names[at + 1] if at + 1 < len(names) else None)
