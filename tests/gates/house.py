"""Gate: the house stands as CONTRIBUTING.md draws it.

Chapters match modules; a module imports only from its own floor or a lower one, and nothing in
circles; the rooms of `LIMITS` stay short and simple. The floors are read from CONTRIBUTING.md,
where they are written down once.
"""

import ast
import graphlib
import re
import time

from common import ROOT, finish, notebooks, read
from measures import complexity, functions

LIBRARY = "unpaired_kd"
LIMITS = {
    "study": (400, 12),
    "command": (400, 12),
}  # folder: lines of a module, complexity of a function
FREE_FOLDERS = {"experiments", "results"}  # their chapters export nothing; nor need these:
FREE_CHAPTERS = {
    "boxes",
    "core_at_work",
    "data.phantoms.bone_measured",
    "data.unpaired",
    "distillation.codebook_health",
    "index",
    "methods.lotus_at_work",
    "methods.vpbsd_at_work",
    "metrics.yardsticks",
    "networks.reach",
    "notation",
    "references",
    "study.simulations",
    "tour",
}
FLOOR = re.compile(r"^\| (\d+) \| (`\w+`(?:, `\w+`)*) \|", re.M)
CEILING = re.compile(r"`(\w+)` imports nothing above floor (\d+)")
BY_NAME = re.compile(rf"({LIBRARY}(?:\.\w+)+)(?::\w+)?")


# ---------------------------------------------------------------- chapters and modules
def exported_module(path):
    "What a chapter's `#| default_exp` names, or None."
    for cell in read(path)["cells"]:
        named = re.search(r"^#\| *default_exp +(\S+)", cell["source"], re.M)
        if cell["cell_type"] == "code" and named:
            return named[1]
    return None


def modules(root=ROOT):
    "Dotted name inside the library -> path of every module; a package goes by its folder's name."
    found = {}
    for path in sorted((root / LIBRARY).rglob("*.py")):
        parts = path.relative_to(root / LIBRARY).with_suffix("").parts
        if parts not in (
            ("__init__",),
            ("_modidx",),
        ):  # the door, which opens every room, and nbdev's index
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def chapters_match(root=ROOT):
    "nbs/PATH.ipynb exports unpaired_kd/PATH.py and nothing else; no module lies loose but core."
    exported = set()
    for path in notebooks(root):
        place = path.relative_to(root / "nbs").with_suffix("")
        own = ".".join(place.parts)
        named = exported_module(path)
        free = place.parts[0] in FREE_FOLDERS or own in FREE_CHAPTERS
        if named is None and not free:
            yield f"nbs/{place}.ipynb exports no module: write `#| default_exp {own}`"
        elif named is not None and place.parts[0] in FREE_FOLDERS:
            folder = place.parts[0]
            yield f"nbs/{place}.ipynb exports {named}: what stands in {folder}/ exports nothing"
        elif named not in (None, own):
            yield f"nbs/{place}.ipynb exports {named}: its place says {own}"
        exported.add(named)
    for name, path in modules(root).items():
        if path.stem == "__init__":
            continue
        if name not in exported:
            yield f"{path.relative_to(root)} has no chapter nbs/{name.replace('.', '/')}.ipynb"
        if "." not in name and name != "core":
            yield f"{path.relative_to(root)} lies loose: move its chapter into a folder"


# ---------------------------------------------------------------- floors and circles
def floors(text):
    "CONTRIBUTING.md's table: ({folder: its floor}, {folder: the highest floor it may import})."
    floor = {f: int(n) for n, row in FLOOR.findall(text) for f in re.findall(r"\w+", row)}
    ceiling = {folder: int(n) for folder, n in CEILING.findall(text)}
    return floor, floor | ceiling


def imported_names(node, package):
    "Dotted names that an import, or a string that is nothing but a module's name, refers to."
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) + 1 - node.level] if node.level else []
        base = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{base}.{a.name}" for a in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        named = BY_NAME.fullmatch(node.value)
        return [named[1]] if named else []
    return []


def ties(root=ROOT):
    "(module, what it imports, line, whether only by name) of imports, inside functions too."
    known = modules(root)
    for module, path in known.items():
        inside = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            for name in imported_names(node, [LIBRARY, *inside]):
                other = name.removeprefix(f"{LIBRARY}.")
                while other and other not in known:  # the name of a function: its module
                    other = other.rpartition(".")[0]
                if name.startswith(f"{LIBRARY}.") and other not in ("", module):
                    yield module, other, node.lineno, isinstance(node, ast.Constant)


def folder_of(module):
    "The folder on whose floor a module stands."
    return module.split(".")[0]


def is_entry(tie):
    "A table may name, within its folder, the modules that enter themselves into it."
    module, other, _, by_name = tie
    return by_name and folder_of(module) == folder_of(other)


def upward(found, text):
    "One complaint for each tie to a higher floor, and for folders that the table leaves out."
    floor, highest = floors(text)
    used = {folder_of(m) for tie in found for m in tie[:2]}
    yield from (f"CONTRIBUTING.md gives {f}/ no floor" for f in sorted(used - floor.keys()))
    for module, other, line, by_name in found:
        own = folder_of(module)
        there = folder_of(other)
        if own == there or own not in floor or there not in floor:
            continue
        how = "names" if by_name else "imports"
        limit = floor[own] if by_name else highest[own]  # what is loaded on demand: the floor alone
        if floor[there] > limit:
            place = f"{module}, line {line}, {how} {other}"
            yield f"{place}: {own} may look no higher than floor {limit}"


def circles(arrows):
    "Circles of a graph {from: {to}} as paths; an arrow of each is taken out until none is left."
    graph = {a: sorted(b) for a, b in sorted(arrows.items())}
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
            return
        except graphlib.CycleError as e:
            path = e.args[1][:0:-1]  # graphlib lists who is needed before who needs it
            first = path.index(min(path))
            path = path[first:] + path[: first + 1]
            yield " -> ".join(path)
            graph[path[0]].remove(path[1])


def graph_of(pairs):
    "{from: {to}} of pairs of different names."
    graph = {}
    for a, b in pairs:
        if a != b:
            graph.setdefault(a, set()).add(b)
    return graph


# ---------------------------------------------------------------- sizes
def too_much(root=ROOT, limits=LIMITS):
    "Modules and functions over the limits of their folder."
    for name, path in modules(root).items():
        if folder_of(name) not in limits:
            continue
        most_lines, most_ways = limits[folder_of(name)]
        text = path.read_text()
        where = path.relative_to(root)
        lines = len(text.splitlines())
        if lines > most_lines:
            yield f"{where} has {lines} lines, at most {most_lines}: make it two chapters"
        for function, node in functions(ast.parse(text)):
            if (n := complexity(node)) > most_ways:
                much = f"{where}: {function} has complexity {n}, at most {most_ways}"
                yield f"{much}: take a step out of it"


def main():
    start = time.time()
    found = sorted(set(ties()))
    complaints = [*chapters_match(), *upward(found, (ROOT / "CONTRIBUTING.md").read_text())]
    rooms = graph_of((folder_of(a), folder_of(b)) for a, b, *_ in found)
    close = (t[:2] for t in found if not is_entry(t))
    complaints += [f"a circle of modules: {c}" for c in circles(graph_of(close))]
    complaints += [f"a circle of folders: {c}" for c in circles(rooms)]
    complaints += too_much()
    summary = (
        f"{len(modules())} modules in {len(rooms)} folders, {len({t[:2] for t in found})} ties"
    )
    finish("house", complaints, summary, start)


if __name__ == "__main__":
    main()
