"""The gates can fail: each is shown a small fault and must name it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GATES = ROOT / "tests" / "gates"
sys.path.insert(0, str(GATES))
NAMES = ("pages", "config", "readme", "sources", "house", "measures", "names", "stored")
pages, config, readme, sources, house, measures, names, stored = (
    pytest.importorskip(n) for n in NAMES
)
build = pytest.importorskip("book.build")
own_site, rewrite = build.own_site, build.rewrite
render = pytest.importorskip("book.pages").render
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)


def md(text):
    return dict(cell_type="markdown", source=text, metadata={})


def code(text, *outputs):
    return dict(
        cell_type="code", source=text, metadata={}, outputs=list(outputs), execution_count=None
    )


def picture():
    return dict(output_type="display_data", metadata={}, data={"image/png": PNG})


def rendered(tmp_path, *cells):
    "What the page gate says about a prepared notebook of these cells."
    page = render(dict(cells=list(cells), metadata={}), "page.ipynb", tmp_path)
    (tmp_path / "page.html").write_text(f"<h1 id='t'>T</h1>{rewrite(page.body, page.name)}")
    links = pages.linked(tmp_path)
    return page.complaints + list(pages.broken("page.html", links, tmp_path))


FIGURE = '#| label: fig-a\n#| fig-cap: "C"\n#| fig-alt: "A"\nplot()'


def test_a_good_page_passes(tmp_path):
    assert (
        rendered(
            tmp_path,
            md(
                "# T\n\nSee @fig-a, $x^2$, @eq-b and `@fig-not`. [up](#t)\n\n"
                "$$y$$ {#eq-b}\n\n```\n@fig-code\n```"
            ),
            code(FIGURE, picture()),
        )
        == []
    )
    html = (tmp_path / "page.html").read_text()
    assert (
        '<a href="#fig-a">Figure 1</a>' in html
        and 'id="fig-a"' in html
        and 'id="eq-b"' in html
        and "<figcaption" in html
        and "<math" in html
        and "@fig-not" in html
        and "@fig-code" in html
    )


@pytest.mark.parametrize(
    "cells, said",
    [
        ([md("see @fig-b"), code(FIGURE, picture())], "@fig-b has no target"),
        ([code(FIGURE.replace('#| fig-alt: "A"\n', ""), picture())], "without `#| fig-alt`"),
        ([code(FIGURE, picture(), picture())], "2 pictures"),
        ([code(FIGURE, picture()), code(FIGURE, picture())], "fig-a stands twice"),
        ([md("[unknown](#ref-unknown)")], "unknown: no such heading"),
        ([md("$\\notamacro{x$")], "pandoc"),
        ([md("[a](other.ipynb)")], "other.html: no such file"),
        ([md("[a](#nowhere)")], "no such heading"),
        ([md("[a](../../secret.md)")], "leaves the site"),
        ([md(f"[a]({own_site()}/data/images.html)")], "images.html: no such file"),
        ([md("![a](gone.png)")], "gone.png"),
    ],
)
def test_faults_of_a_page_are_named(tmp_path, cells, said):
    assert any(said in c for c in rendered(tmp_path, *cells))


def test_the_sidebar_counts(tmp_path):
    (tmp_path / "nbs").mkdir()
    for n in "abc":
        (tmp_path / f"nbs/{n}.ipynb").write_text("{}")
    (tmp_path / "nbs/sidebar.yml").write_text(
        "website: {sidebar: {contents: "
        "[a.ipynb, {section: S, contents: [b.ipynb, a.ipynb, d.ipynb]}]}}"
    )
    assert config.sidebar(tmp_path) == [
        "sidebar.yml names a.ipynb 2 times",
        "sidebar.yml leaves out c.ipynb",
        "sidebar.yml names d.ipynb, which is not there",
    ]


def test_pins(tmp_path):
    project = {
        "name": "p",
        "dependencies": ["numpy>=2", "torch", "scipy"],
        "optional-dependencies": {"dev": ["pytest"]},
    }
    said = config.pinned(
        project,
        ["# note", "numpy==1.26", "torch==2.13.0", "torch==2.12.0", "pytest @ file:///somewhere"],
    )
    assert [
        any(w in s for s in said)
        for w in ("numpy 1.26, outside", "'torch' twice", "pytest @", "does not pin scipy")
    ] == [True] * 4


def test_extras_that_name_other_extras_are_opened():
    extras = {
        "dev": ["p[run,tsne]", "pytest"],
        "run": ["papermill>=2"],
        "tsne": ["openTSNE"],
        "log": ["tensorboard"],
    }
    project = {"name": "p", "dependencies": [], "optional-dependencies": extras}
    found = [str(r) for r in config.opened(project, ["dev"])]
    assert found == ["papermill>=2", "openTSNE", "pytest"]
    said = config.pinned(project, ["pytest==9", "papermill==1.0", "openTSNE==1"])
    assert said == ["constraints.txt pins papermill 1.0, outside >=2"]


def test_what_nothing_imports_is_dead(tmp_path):
    for folder in ("unpaired_kd", "tests", "nbs"):
        (tmp_path / folder).mkdir()
    library = "import torch\ndef f():\n    from skimage import io\n    # import onnx some day"
    (tmp_path / "unpaired_kd/a.py").write_text(library)
    (tmp_path / "tests/test_a.py").write_text("g = pytest.importorskip('gudhi')")
    cells = [md("`import dask`"), code("from openTSNE import TSNE")]
    (tmp_path / "nbs/b.ipynb").write_text(json.dumps(dict(cells=cells)))
    extras = {"all": ["p[tsne]", "gudhi", "einops", "dask[array]", "onnx"], "tsne": ["openTSNE"]}
    project = {
        "name": "p",
        "dependencies": ["torch", "scikit-image"],
        "optional-dependencies": extras,
    }
    said = config.used(project, tmp_path)
    assert said == [f"pyproject.toml declares {n}, which nothing imports" for n in ("dask", "onnx")]


def test_citation_and_addresses_follow_the_settings(tmp_path):
    ini = config.settings()
    project = config.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "CITATION.cff").read_text()
    (tmp_path / "CITATION.cff").write_text(text)
    assert config.addresses(ini, project, tmp_path) == []
    text = text.replace(f"version: {ini['version']}", "version: 9.9")
    text = text.replace("message:", "massage:")
    (tmp_path / "CITATION.cff").write_text(text)
    project["urls"]["Issues"] = "https://elsewhere"
    said = config.addresses(ini, project, tmp_path)
    assert len(said) == 3
    assert "9.9" in said[0] and "'message'" in said[1] and "https://elsewhere" in said[2]


def test_imports_are_declared(tmp_path):
    (tmp_path / "unpaired_kd").mkdir()
    (tmp_path / "unpaired_kd/a.py").write_text(
        "import os, torch\nimport monai\nfrom .b import c\nfrom skimage import io\n"
        "def f():\n    import zarr\n    import nothing_known"
    )
    project = {
        "name": "p",
        "dependencies": ["torch", "monai"],
        "optional-dependencies": {"volumes": ["zarr"]},
    }
    said = config.declared(project, tmp_path)
    assert sorted(s.split(" imports ")[1].split(",")[0].split(" at once")[0] for s in said) == [
        "monai",
        "nothing_known",
        "skimage",
        "skimage",
    ]


def test_the_readme_is_the_index(tmp_path):
    (tmp_path / "nbs").mkdir()
    cells = [
        md(
            "# T\n\n[a](1_data/a.ipynb) [b](https://x.org) [c](#t) ![d](images/d.png){width=50%}\n"
            "```\n[e](f)\n```"
        ),
        code("#| echo: false\nprint(1)", dict(output_type="stream", name="stdout", text=["1\n"])),
        code("#| hide\n2"),
    ]
    (tmp_path / "nbs/index.ipynb").write_text(json.dumps(dict(cells=cells)))
    site = "https://github.com/unpaired-kd/unpaired_kd/blob/main/nbs"
    raw = "https://raw.githubusercontent.com/unpaired-kd/unpaired_kd/main/nbs"
    assert readme.render(tmp_path).split("\n", 2)[2] == (
        f"# T\n\n[a]({site}/1_data/a.ipynb) [b](https://x.org) [c](#t) ![d]({raw}/images/d.png)\n"
        "```\n[e](f)\n```\n\n```\n1\n```\n"
    )


def test_the_first_page_shows_what_its_notebook_draws(tmp_path):
    (tmp_path / "nbs/images").mkdir(parents=True)
    drawn = [dict(output_type="display_data", data={"image/svg+xml": ["<svg>", "</svg>"]})]
    cells = [md("# T"), code("#| hide\n#| label: fig-idea\ndraw()", *drawn)]
    (tmp_path / "nbs/index.ipynb").write_text(json.dumps(dict(cells=cells)))
    idea = tmp_path / "nbs/images/idea.svg"
    social = tmp_path / "nbs/images/social.png"
    assert readme.pictures(tmp_path) == {idea: b"<svg></svg>"}
    said = list(readme.stale_pictures(tmp_path))
    assert "idea.svg is not what" in said[0] and "social.png is missing" in said[1]
    idea.write_text("<svg></svg>")
    social.write_bytes(bytes(16) + (1200).to_bytes(4, "big") + (630).to_bytes(4, "big"))
    assert list(readme.stale_pictures(tmp_path)) == []
    social.write_bytes(bytes(16) + (1200).to_bytes(4, "big") + (600).to_bytes(4, "big"))
    idea.write_text("<svg/>")
    said = list(readme.stale_pictures(tmp_path))
    assert "idea.svg is not what" in said[0] and "1200 x 600" in said[1]


def test_differences_are_named():
    said = sources.differences(
        {"a.py": b"1\n2\n", "b.py": b""}, {"a.py": b"1\n3\n", "c.py": b""}, "mend it"
    )
    assert (
        len(said) == 3
        and "-2" in said[0]
        and "+3" in said[0]
        and "no notebook" in said[1]
        and "missing" in said[2]
    )


# ---------------------------------------------------------------- stored text is fresh text
def printed(*texts):
    return [dict(output_type="stream", name="stdout", text=[t]) for t in texts]


def value(text, **more):
    return [
        dict(
            output_type="execute_result",
            metadata={},
            execution_count=None,
            data={"text/plain": [text], **more},
        )
    ]


@pytest.mark.parametrize(
    "old, new",
    [
        (printed("Dice 0.81 after 12.3 s\n"), printed("Dice 0.81 ", "after 9 s\n")),
        (
            printed("  65 ms|1.2e+05 voxels a second, 3,000 images/s"),
            printed(" 101 ms|9 voxels a second, 4 images/s"),
        ),
        (printed("3.4 times as fast, 210.5 MB peak"), printed("12 times as fast, 99 MB peak")),
        (value("<f at 0x7f0011aa22bb>"), value("<f at 0x7f00ffaa2200>")),
        (value("Box()", **{"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}), []),
        ([picture()], [picture()]),
        (printed("a") + [dict(output_type="stream", name="stderr", text=["100%"])], printed("a")),
    ],
)
def test_measured_text_may_differ(old, new):
    assert stored.difference(old, new) is stored.difference(new, old) is None


@pytest.mark.parametrize(
    "old, new, said",
    [
        (
            printed("Dice 0.81 after 12 s"),
            printed("Dice 0.82 after 12 s"),
            "+Dice 0.82 after MEASURED",
        ),
        (
            printed("3 times, 4 stages, 5 MB"),
            printed("3 times, 4 stages, 6 MB"),
            "+3 times, 4 stages, 6 MB",
        ),
        (value("8 methods"), value("9 methods"), "-8 methods"),
        (printed("a"), [], "-a"),
        ([], value("a"), "+a"),
        ([picture()], [], "stores 1 pictures, draws 0"),
    ],
)
def test_stale_text_is_named(old, new, said):
    assert said in stored.difference(old, new)


def test_a_measured_cell_compares_its_words():
    assert stored.difference(printed("69% of  1.02"), printed("7% of 11.5"), measured=True) is None
    assert stored.difference(printed("69% of 1.02"), printed("69% off 1.02"), measured=True)


def run_cells(folder, *cells):
    "What the notebook gate finds in a chapter of these cells."
    page = folder / "page.ipynb"
    cells = [c | dict(id=f"{i:08x}") for i, c in enumerate(cells)]
    page.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import notebooks, pathlib\n"
            f"said = notebooks.run_chapter(pathlib.Path({str(page)!r}), {{'slow'}})\n"
            "print(*said, sep='\\n')",
        ],
        capture_output=True,
        text=True,
        cwd=GATES,
    )
    return done.stdout


def test_a_chapter_runs_and_is_compared(tmp_path):
    said = run_cells(
        tmp_path,
        md("# T\n\n> c"),
        code("x = 2; print(x); x;", *printed("2\n")),
        code("x + 1; # kept back"),
        code("#| measured\nprint(f'{x} ways')", *printed("7 ways\n")),
        code("#| slow\n1 / 0"),
        code("x", *value("3")),
        code("print(x)"),
    )
    assert (
        "cell 5" in said
        and "-3" in said
        and "cell 6" in said
        and "+2" in said
        and said.count("stores") == 2
        and said.endswith("]\n5\n")
    )


def test_a_chapter_that_fails_is_named(tmp_path):
    said = run_cells(tmp_path, md("# T\n\n> c"), code("1 / 0"), code("print(1)"))
    assert "ZeroDivisionError" in said and "Cell #2" in said and "stores" not in said


# ---------------------------------------------------------------- the house
FLOORS = """| floor | folders | hold |
|---|---|---|
| 0 | `core` | seeds |
| 1 | `data`, `metrics` | files |
| 2 | `networks` | networks |
| 3 | `training`, `inference` | the learner (`inference` imports nothing above floor 1) |
| 4 | `study` | studies |
"""


def tree(folder, files):
    """Write {path: text}; a chapter's text is what it exports: "" for none, "=" for its own
    module."""
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".ipynb":
            own = ".".join(file.relative_to(folder / "nbs").with_suffix("").parts)
            named = f"#| default_exp {own if text == '=' else text}\n#| hide" if text else "1 + 1"
            text = json.dumps(dict(cells=[md("# T"), code(named)]))
        file.write_text(text)
    return folder


def test_chapters_match_modules(tmp_path):
    good = {
        "nbs/core.ipynb": "=",
        "nbs/data/sets/chest.ipynb": "=",
        "nbs/index.ipynb": "",
        "nbs/results/lotus.ipynb": "",
        "unpaired_kd/core.py": "",
        "unpaired_kd/__init__.py": "",
        "unpaired_kd/data/__init__.py": "",
        "unpaired_kd/data/sets/chest.py": "",
    }
    assert list(house.chapters_match(tree(tmp_path, good))) == []
    tree(
        tmp_path,
        {
            "nbs/data/a.ipynb": "data.b",
            "nbs/data/free.ipynb": "",
            "unpaired_kd/loose.py": "",
            "nbs/results/own.ipynb": "=",
            "unpaired_kd/data/orphan.py": "",
        },
    )
    said = "\n".join(house.chapters_match(tmp_path))
    for fault in (
        "nbs/data/a.ipynb exports data.b: its place says data.a",
        "nbs/data/free.ipynb exports no module: write `#| default_exp data.free`",
        "nbs/results/own.ipynb exports results.own",
        "unpaired_kd/loose.py lies loose",
        "unpaired_kd/data/orphan.py has no chapter nbs/data/orphan.ipynb",
    ):
        assert fault in said


def tied(folder, files):
    "What the gate says about the floors and the circles of these modules."
    found = sorted(set(house.ties(tree(folder, {f"unpaired_kd/{k}": v for k, v in files.items()}))))
    near = [t[:2] for t in found if not house.is_entry(t)]
    rooms = house.graph_of((house.folder_of(a), house.folder_of(b)) for a, b, *_ in found)
    return [
        *house.upward(found, FLOORS),
        *house.circles(house.graph_of(near)),
        *house.circles(rooms),
    ]


def test_floors_and_circles_pass(tmp_path):
    assert (
        tied(
            tmp_path,
            {
                "core.py": "import os",
                "data/__init__.py": "",
                "data/a.py": "from ..core import x\nimport unpaired_kd",
                "data/sets/b.py": "from ..a import y\nfrom ...metrics import dice",
                "metrics/dice.py": "from .. import core",
                "networks/table.py": 'MODULES = ["unpaired_kd.networks.unet"]',
                "networks/unet.py": "from .table import T",
                "inference/student.py": 'PACKED = {"net": "unpaired_kd.networks.unet:Net"}\n'
                "from ..data import a",
                "inference/volumes.py": "from .student import S",
                "study/run.py": "def f():\n    from unpaired_kd.training import learner",
                "training/learner.py": "",
            },
        )
        == []
    )


@pytest.mark.parametrize(
    "files, said",
    [
        (
            {"data/a.py": "\nfrom ..networks.unet import U", "networks/unet.py": ""},
            "data.a, line 2, imports networks.unet",
        ),
        (
            {"data/a.py": "def f():\n    import unpaired_kd.study.run as r", "study/run.py": ""},
            "imports study.run",
        ),
        (
            {
                "networks/t.py": 'M = "unpaired_kd.training.learner:Learner"',
                "training/learner.py": "",
            },
            "names training.learner",
        ),
        (
            {"inference/s.py": "from ..networks import unet", "networks/unet.py": ""},
            "no higher than floor 1",
        ),
        ({"attic/a.py": "from ..core import x", "core.py": ""}, "gives attic/ no floor"),
        (
            {"data/a.py": "from . import b", "data/b.py": "def f():\n    from .a import x"},
            "data.a -> data.b -> data.a",
        ),
        (
            {
                "data/a.py": "from ..metrics import m",
                "metrics/m.py": "",
                "metrics/n.py": "from ..data.b import x",
                "data/b.py": "",
            },
            "data -> metrics -> data",
        ),
    ],
)
def test_faults_of_the_house_are_named(tmp_path, files, said):
    assert any(said in c for c in tied(tmp_path, files))


def test_circles_are_named():
    assert list(
        house.circles({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"e", "a"}, "e": {"c"}})
    ) == ["a -> b -> a", "c -> d -> e -> c"]
    assert list(house.circles({"a": {"b", "c"}, "b": {"c"}})) == []


def test_the_floors_are_read_from_the_guide():
    floor, highest = house.floors((ROOT / "CONTRIBUTING.md").read_text())
    assert (
        floor["core"] == 0
        and floor["data"] == 1
        and floor["study"] == floor["analysis"]
        and floor["command"] == 7
    )
    assert (highest["inference"], floor["inference"]) == (2, 4)


@pytest.mark.parametrize(
    "text, ways",
    [
        ("def f(): pass", 1),
        (
            "def f(a):\n    if a: return 1\n    elif a > 2: return 2\n    else: return 3",
            3,
        ),  # two questions
        ("def f(a, b, c): return a and b or c", 3),  # one `and`, one `or`
        ("def f(a, b, c): return a and b and c", 3),  # two `and`s
        ("def f(a): return 1 if a else 2 if a is None else 3", 3),
        ("def f(xs): return [x for x in xs if x if x > 1]", 4),  # a loop and two questions
        ("def f(xs):\n    for x in xs:\n        while x: x -= 1\n    else: pass", 3),
        ("def f():\n    try: g()\n    except A: pass\n    except B: pass\n    finally: h()", 3),
        (
            "def f(a):\n    def g(b):\n        if b: return a\n    return g",
            2,
        ),  # what is defined inside counts
        (
            "def f(a):\n    match a:\n        case 1: return 2\n        case [x]: return x\n"
            "        case _: return 3",
            3,
        ),
        ("def f(a):\n    assert a\n    with a as b: return (lambda x: x or b)(a)", 3),
    ],
)
def test_complexity_counted_by_hand(text, ways):
    assert measures.complexity(ast.parse(text).body[0]) == ways


def test_methods_are_measured_too():
    found = dict(
        measures.functions(
            ast.parse(
                "class A:\n    def f(self): return 1\n    class B:\n        def g(self): pass\n"
                "def h(): pass"
            )
        )
    )
    assert list(found) == ["A.f", "A.B.g", "h"]


def test_long_modules_and_tangled_functions_are_named(tmp_path):
    tree(
        tmp_path,
        {
            "unpaired_kd/study/run.py": "x = 1\n" * 3 + "def f(a, b):\n    return a or b",
            "unpaired_kd/data/a.py": "x = 1\n" * 9,
        },
    )
    assert list(house.too_much(tmp_path, {"study": (5, 2)})) == []
    long, tangled = house.too_much(tmp_path, {"study": (4, 1)})
    assert (
        "run.py has 5 lines, at most 4" in long
        and "run.py: f has complexity 2, at most 1" in tangled
    )


# ---------------------------------------------------------------- names without a use
def test_private_names_that_nobody_calls_are_named(tmp_path):
    tree(
        tmp_path,
        {
            "unpaired_kd/a.py": "class A:\n    def _used(self): return self._idle_too\n"
            "    def __len__(self): return 1\ndef _idle(): pass",
            "unpaired_kd/b.py": "from .a import A\nA()._used()\ndef _own(): return 1\nX = _own\n"
            "class _Gone: pass",
            "unpaired_kd/_modidx.py": "_idle",
        },
    )
    assert [s.split(": ")[1] for s in names.idle(tmp_path)] == [
        "_idle is never used",
        "_Gone is never used",
    ]


def test_an_unknown_gate_is_refused():
    done = subprocess.run([sys.executable, str(GATES), "pags"], capture_output=True, text=True)
    assert done.returncode == 1 and "pages" in done.stderr


@pytest.mark.parametrize("code, refused", [("x = 1", False), ("x = 1\n#| hide\ny = 2", True)])
def test_an_option_below_the_code_is_refused(tmp_path, code, refused):
    cells = [("markdown", "# Title\n\n> claim"), ("code", f"#| export\n{code}")]
    told = [
        dict(cell_type=kind, id=str(i), metadata={}, source=[source])
        for i, (kind, source) in enumerate(cells)
    ]
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/page.ipynb").write_text(json.dumps(dict(cells=told)))
    assert ["below its code" in c for c in sources.manners(tmp_path)] == [True] * refused
