"""Gate: settings.ini, pyproject.toml, constraints.txt, Quarto files and sidebar agree."""

import ast
import configparser
import re
import sys
import time
import tomllib
from itertools import chain

import yaml
from common import ROOT, finish, notebooks, read
from packaging.requirements import Requirement


def settings(root=ROOT):
    "settings.ini as a dict, its %(name)s not yet filled in."
    config = configparser.RawConfigParser()
    config.read(root / "settings.ini")
    return dict(config["DEFAULT"])


def two_files_agree(ini, project, tool):
    "settings.ini against pyproject.toml."
    script, _, target = ini["console_scripts"].partition("=")
    pairs = {
        "name": (ini["lib_name"], project["name"]),
        "version": (ini["version"], project["version"]),
        "description": (ini["description"], project["description"]),
        "minimal Python": (f">={ini['min_python']}", project["requires-python"]),
        "keywords": (ini["keywords"].split(), project["keywords"]),
        "author": (
            (ini["author"], ini["author_email"]),
            (project["authors"][0]["name"], project["authors"][0]["email"]),
        ),
        "console script": ({script.strip(): target.strip()}, project["scripts"]),
    }
    pairs |= {f"[tool.nbdev] {k}": (ini[k], v) for k, v in tool.items()}
    return [
        f"{what}: settings.ini says {a!r}, pyproject.toml says {b!r}"
        for what, (a, b) in pairs.items()
        if a != b
    ]


def opened(project, names):
    "The requirements of some extras; where one names others of its own project, theirs too."
    extras = project["optional-dependencies"]
    for line in chain.from_iterable(extras[name] for name in names):
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            yield requirement
        else:
            yield from opened(project, sorted(requirement.extras))


def pinned(project, lines):
    "Every direct dependency, those of the dev extra too, has one pin that its range admits."
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {p.name.lower(): str(p.specifier).removeprefix("==") for p in pins}
    found = [
        f"constraints.txt pins {n!r} twice"
        for n in versions
        if sum(p.name.lower() == n for p in pins) > 1
    ]
    found += [f"constraints.txt: {p} names a place" for p in pins if p.url]
    for r in [*map(Requirement, project["dependencies"]), *opened(project, ["dev"])]:
        if r.name.lower() not in versions:
            found.append(f"constraints.txt does not pin {r.name}")
        elif not r.specifier.contains(versions[r.name.lower()]):
            found.append(
                f"constraints.txt pins {r.name} {versions[r.name.lower()]}, outside {r.specifier}"
            )
    return found


HEAVY = {
    "monai",
    "matplotlib",
    "papermill",
    "IPython",
    "ipywidgets",
    "accelerate",
    "skimage",
    "sklearn",
    "nibabel",
    "tifffile",
}
DISTRIBUTION = {
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pypandoc": "pypandoc_binary",
    "websocket": "websocket-client",
}
# declared and never imported by us: who needs it
NEEDED_BY = {
    "einops": "MONAI's transformers",
    "tensorboard": "torch.utils.tensorboard",
    "ipykernel": "papermill",
    "execnb": "nbdev, which admits versions that do not fit",
    "jupyterlab": "the author of a chapter",
    "ruff": "the gate of unused names",
    "build": "the wheel gate",
    "hatchling": "the build",
    "editables": "the build, for an editable installation",
}


def imported(root=ROOT):
    """Third-party modules that the library imports: (module, file, whether that happens as soon as
    the file is imported).
    """
    for path in sorted((root / "unpaired_kd").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for name in (
                {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"unpaired_kd"}
            ):
                yield name, path.relative_to(root), node in tree.body


def declared(project, root=ROOT):
    """What the library imports is declared: at the top of a file by a plain dependency, inside
    functions by an extra at least.
    """
    plain = {Requirement(r).name.lower() for r in project["dependencies"]}
    extras = {r.name.lower() for r in opened(project, project["optional-dependencies"])}
    found = []
    for name, path, at_once in imported(root):
        package = DISTRIBUTION.get(name, name).lower()
        if package not in plain | (set() if at_once else extras):
            how = " as a plain dependency" if at_once else ""
            found.append(f"{path} imports {name}, which pyproject.toml does not declare{how}")
        if at_once and name in HEAVY:
            found.append(f"{path} imports {name} at once: do it in the function that needs it")
    return found


STATEMENT = re.compile(r"^\s*(?:import|from) (\w+)|; (?:import|from) (\w+)", re.M)
BY_NAME = re.compile(r"(?:find_spec|importorskip|import_module|extra)\([\"'](\w+)")


def used(project, root=ROOT):
    "What is declared is imported by the library, a chapter or a test, or `NEEDED_BY` says by whom."
    files = [p for place in ("unpaired_kd", "tests", "book") for p in (root / place).rglob("*.py")]
    cells = [c for p in notebooks(root) for c in read(p)["cells"] if c["cell_type"] == "code"]
    text = "\n".join([*(p.read_text() for p in files), *(c["source"] for c in cells)])
    names = {a or b for a, b in STATEMENT.findall(text)} | set(BY_NAME.findall(text))
    there = {DISTRIBUTION.get(n, n).lower() for n in names} | NEEDED_BY.keys()
    extras = opened(project, project["optional-dependencies"])
    wanted = dict.fromkeys(r.name for r in [*map(Requirement, project["dependencies"]), *extras])
    dead = [n for n in wanted if n.lower() not in there]
    return [f"pyproject.toml declares {n}, which nothing imports" for n in dead]


def chapters(entry):
    "All files named in a sidebar, in order."
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        if "href" in entry:
            yield entry["href"]
        for e in entry.get("contents", []):
            yield from chapters(e)


def sidebar(root=ROOT):
    "Every notebook exactly once, and no other."
    named = [
        c
        for e in yaml.safe_load((root / "nbs/sidebar.yml").read_text())["website"]["sidebar"][
            "contents"
        ]
        for c in chapters(e)
    ]
    there = [str(p.relative_to(root / "nbs")) for p in notebooks(root)]
    found = [
        f"sidebar.yml names {c} {named.count(c)} times"
        for c in dict.fromkeys(named)
        if named.count(c) > 1
    ]
    return (
        found
        + [f"sidebar.yml leaves out {c}" for c in there if c not in named]
        + [f"sidebar.yml names {c}, which is not there" for c in named if c not in there]
    )


def quarto(ini, root=ROOT):
    "The Quarto files load, nbdev.yml follows settings.ini, and the link is a link."
    found = []
    for path in [
        root / "_quarto.yml",
        *sorted((root / "nbs").glob("*.yml")),
        *sorted((root / ".github").rglob("*.y*ml")),
    ]:
        try:
            yaml.safe_load(path.read_text())
        except yaml.YAMLError as e:
            found.append(f"{path.relative_to(root)}: {e}")
    if (root / "nbs/_quarto.yml").resolve() != (root / "_quarto.yml").resolve():
        found.append("nbs/_quarto.yml is not a link to ../_quarto.yml")
    site = yaml.safe_load((root / "nbs/nbdev.yml").read_text())
    want = {
        "title": ini["title"],
        "site-url": ini["doc_host"] % ini + ini["doc_baseurl"] % ini,
        "description": ini["description"],
        "repo-branch": ini["branch"],
        "repo-url": ini["git_url"] % ini,
    }
    return found + [
        f"nbs/nbdev.yml: {k} is {site['website'].get(k)!r}, settings.ini says {v!r}"
        for k, v in want.items()
        if site["website"].get(k) != v
    ]


def addresses(ini, project, root=ROOT):
    "What the package index and the citation say follows settings.ini too."
    site = ini["git_url"] % ini
    book = ini["doc_host"] % ini + ini["doc_baseurl"] % ini
    cited = yaml.safe_load((root / "CITATION.cff").read_text())
    want = {
        "title": ini["title"],
        "version": ini["version"],
        "license": project["license"],
        "repository-code": site,
        "url": book,
    }
    found = [
        f"CITATION.cff: {k} is {cited.get(k)!r}, the settings say {v!r}"
        for k, v in want.items()
        if cited.get(k) != v
    ]
    found += [
        f"CITATION.cff has no {k!r}, which its format asks for"
        for k in ("cff-version", "message", "authors")
        if not cited.get(k)
    ]
    urls = {
        "Homepage": site,
        "Source": site,
        "Documentation": book,
        "Issues": f"{site}/issues",
        "Changelog": f"{site}/blob/{ini['branch']}/CHANGELOG.md",
    }
    return found + [
        f"pyproject.toml: URL {k} is {project['urls'].get(k)!r}, the settings say {v!r}"
        for k, v in urls.items()
        if project["urls"].get(k) != v
    ]


def main():
    start = time.time()
    ini = settings()
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = two_files_agree(ini, toml["project"], toml["tool"]["nbdev"]) + pinned(
        toml["project"], (ROOT / "constraints.txt").read_text().splitlines()
    )
    version = re.search(r'__version__ = "(.+)"', (ROOT / "unpaired_kd/__init__.py").read_text())
    if not version or version[1] != ini["version"]:
        found.append("unpaired_kd/__init__.py and settings.ini name different versions")
    if "tags" not in ini["allowed_cell_metadata_keys"].split():
        found.append(
            "settings.ini: without allowed_cell_metadata_keys = tags, "
            "nbdev_clean deletes the `parameters` tag"
        )
    found += (
        declared(toml["project"])
        + used(toml["project"])
        + quarto(ini)
        + sidebar()
        + addresses(ini, toml["project"])
    )
    finish(
        "config",
        found,
        "settings.ini, pyproject.toml, constraints.txt, Quarto files, sidebar",
        start,
    )


if __name__ == "__main__":
    main()
