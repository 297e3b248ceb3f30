"""The gates can fail: each is shown a small fault and must name it."""
import json, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GATES = ROOT / "tests" / "gates"
sys.path.insert(0, str(GATES))
pages, config, readme, sources = (pytest.importorskip(n) for n in ("pages", "config", "readme", "sources"))
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def md(text): return dict(cell_type="markdown", source=text, metadata={})
def code(text, *outputs): return dict(cell_type="code", source=text, metadata={}, outputs=list(outputs), execution_count=None)
def picture(): return dict(output_type="display_data", metadata={}, data={"image/png": PNG})


def rendered(tmp_path, *cells):
    "What the page gate says about a notebook of these cells."
    import pypandoc
    (tmp_path / "nbs").mkdir(exist_ok=True)
    (tmp_path / "nbs/references.bib").write_text("@book{known, title={T}, author={A}, year={2000}}")
    page = tmp_path / "_proc" / "page.ipynb"
    page.parent.mkdir(exist_ok=True)
    page.write_text(json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)))
    links, complaints = pages.render(page, tmp_path, pypandoc.get_pandoc_path())
    return complaints + list(pages.broken(Path("page.ipynb"), links, {Path("page.ipynb"): links}, tmp_path, "https://site"))


FIGURE = '#| label: fig-a\n#| fig-cap: "C"\n#| fig-alt: "A"\nplot()'


def test_a_good_page_passes(tmp_path):
    assert rendered(tmp_path, md("# T\n\nSee @fig-a, $x^2$, @eq-b, [@known] and `@fig-not`. [up](#t)\n\n$$y$$ {#eq-b}\n\n```\n@fig-code\n```"), code(FIGURE, picture())) == []
    html = (tmp_path / "_proc/page.html").read_text()
    assert '<a href="#fig-a">Figure 1</a>' in html and 'id="fig-a"' in html and 'id="eq-b"' in html and "<figcaption" in html and "<math" in html and "@fig-not" in html and "@fig-code" in html


@pytest.mark.parametrize("cells, said", [
    ([md("see @fig-b"), code(FIGURE, picture())], "@fig-b has no target"),
    ([code(FIGURE.replace('#| fig-alt: "A"\n', ""), picture())], "without `#| fig-alt`"),
    ([code(FIGURE, picture(), picture())], "2 pictures"),
    ([code(FIGURE, picture()), code(FIGURE, picture())], "fig-a stands twice"),
    ([md("[@unknown]")], "unknown"),
    ([md("$\\notamacro{x$")], "pandoc"),
    ([md("[a](other.ipynb)")], "other.ipynb: no such file"),
    ([md("[a](#nowhere)")], "no such heading"),
    ([md("[a](../../secret.md)")], "leaves the site"),
    ([md("[a](https://site/data/images.html)")], "no such page"),
    ([md("![a](gone.png)")], "gone.png")])
def test_faults_of_a_page_are_named(tmp_path, cells, said):
    assert any(said in c for c in rendered(tmp_path, *cells))


def test_the_sidebar_counts(tmp_path):
    (tmp_path / "nbs").mkdir()
    for n in "abc": (tmp_path / f"nbs/{n}.ipynb").write_text("{}")
    (tmp_path / "nbs/sidebar.yml").write_text("website: {sidebar: {contents: [a.ipynb, {section: S, contents: [b.ipynb, a.ipynb, d.ipynb]}]}}")
    assert config.sidebar(tmp_path) == ["sidebar.yml names a.ipynb 2 times", "sidebar.yml leaves out c.ipynb", "sidebar.yml names d.ipynb, which is not there"]


def test_pins(tmp_path):
    project = {"name": "p", "dependencies": ["numpy>=2", "torch", "scipy"],
               "optional-dependencies": {"dev": ["pytest"]}}
    said = config.pinned(project, ["# note", "numpy==1.26", "torch==2.13.0", "torch==2.12.0", "pytest @ file:///somewhere"])
    assert [any(w in s for s in said) for w in ("numpy 1.26, outside", "'torch' twice", "pytest @", "does not pin scipy")] == [True] * 4


def test_extras_that_name_other_extras_are_opened():
    extras = {"dev": ["p[run,tsne]", "pytest"], "run": ["papermill>=2"], "tsne": ["openTSNE"],
              "log": ["tensorboard"]}
    project = {"name": "p", "dependencies": [], "optional-dependencies": extras}
    found = [str(r) for r in config.opened(project, ["dev"])]
    assert found == ["papermill>=2", "openTSNE", "pytest"]
    said = config.pinned(project, ["pytest==9", "papermill==1.0", "openTSNE==1"])
    assert said == ["constraints.txt pins papermill 1.0, outside >=2"]


def test_what_nothing_imports_is_dead(tmp_path):
    for folder in ("unpaired_kd", "tests", "nbs"): (tmp_path / folder).mkdir()
    library = "import torch\ndef f():\n    from skimage import io\n    # import onnx some day"
    (tmp_path / "unpaired_kd/a.py").write_text(library)
    (tmp_path / "tests/test_a.py").write_text("g = pytest.importorskip('gudhi')")
    cells = [md("`import dask`"), code("from openTSNE import TSNE")]
    (tmp_path / "nbs/b.ipynb").write_text(json.dumps(dict(cells=cells)))
    extras = {"all": ["p[tsne]", "gudhi", "einops", "dask[array]", "onnx"], "tsne": ["openTSNE"]}
    project = {"name": "p", "dependencies": ["torch", "scikit-image"],
               "optional-dependencies": extras}
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
    (tmp_path / "unpaired_kd/a.py").write_text("import os, torch\nimport monai\nfrom .b import c\nfrom skimage import io\ndef f():\n    import zarr\n    import nothing_known")
    project = {"name": "p", "dependencies": ["torch", "monai"],
               "optional-dependencies": {"volumes": ["zarr"]}}
    said = config.declared(project, tmp_path)
    assert sorted(s.split(" imports ")[1].split(",")[0].split(" at once")[0] for s in said) == ["monai", "nothing_known", "skimage", "skimage"]


def test_the_readme_is_the_index(tmp_path):
    (tmp_path / "nbs").mkdir()
    cells = [md("# T\n\n[a](1_data/a.ipynb) [b](https://x.org) [c](#t) ![d](images/d.png){width=50%}\n```\n[e](f)\n```"), code("#| echo: false\nprint(1)", dict(output_type="stream", name="stdout", text=["1\n"])), code("#| hide\n2")]
    (tmp_path / "nbs/index.ipynb").write_text(json.dumps(dict(cells=cells)))
    site = "https://github.com/unpaired-kd/unpaired_kd/blob/main/nbs"
    raw = "https://raw.githubusercontent.com/unpaired-kd/unpaired_kd/main/nbs"
    assert readme.render(tmp_path).split("\n", 2)[2] == (
        f"# T\n\n[a]({site}/1_data/a.ipynb) [b](https://x.org) [c](#t) ![d]({raw}/images/d.png)\n"
        "```\n[e](f)\n```\n\n```\n1\n```\n")


def test_differences_are_named():
    said = sources.differences({"a.py": b"1\n2\n", "b.py": b""}, {"a.py": b"1\n3\n", "c.py": b""}, "mend it")
    assert len(said) == 3 and "-2" in said[0] and "+3" in said[0] and "no notebook" in said[1] and "missing" in said[2]


def test_an_unknown_gate_is_refused():
    done = subprocess.run([sys.executable, str(GATES), "pags"], capture_output=True, text=True)
    assert done.returncode == 1 and "pages" in done.stderr
