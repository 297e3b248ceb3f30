"""The wheel gate can fail: it is shown small faults of a package and must name each."""

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "gates"))
wheel = pytest.importorskip("wheel")
METADATA = "Metadata-Version: 2.4\nName: p\nVersion: 1\n"
MARKDOWN = "Description-Content-Type: text/markdown\n\n"


def a_wheel(path, files, metadata=METADATA + MARKDOWN + "[a](https://b.org)"):
    "A wheel of some files, all of them empty but its description."
    with zipfile.ZipFile(path, "w") as archive:
        for name in files:
            archive.writestr(name, "")
        archive.writestr("p-1.dist-info/METADATA", metadata)
    return path


def test_the_files_of_a_wheel_are_compared(tmp_path):
    packed = wheel.packed()
    known = "__init__.py", "py.typed", "experiments/lotus.ipynb", "experiments/vpbsd_grid.yaml"
    for name in known:
        assert f"unpaired_kd/{name}" in packed
    assert not any("dry.yaml" in n or n.startswith("nbs") for n in packed)
    assert wheel.compare_wheel(a_wheel(tmp_path / "good.whl", packed), packed) == []
    bad = packed - {"unpaired_kd/py.typed", "unpaired_kd/experiments/lotus.ipynb"} | {"nbs/a.py"}
    assert wheel.compare_wheel(a_wheel(tmp_path / "bad.whl", bad), packed) == [
        "the wheel lacks unpaired_kd/experiments/lotus.ipynb",
        "the wheel lacks unpaired_kd/py.typed",
        "the wheel has a stray nbs/a.py",
    ]


def test_the_files_of_an_sdist_are_compared(tmp_path):
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "README.md", "p-1/README.md")
    if not (ROOT / ".git").exists():
        pytest.skip("git does not know these files")
    said = wheel.compare_sdist(tmp_path / "p.tar.gz")
    assert "the sdist lacks nbs/core.ipynb" in said and "the sdist lacks README.md" not in said


@pytest.mark.parametrize(
    "text, said",
    [
        (METADATA.replace("1\n", "one\n") + MARKDOWN + "d", "version"),
        (METADATA + "Summary: two\n lines\n" + MARKDOWN + "d", "summary"),
        (METADATA + "\nd", "not Markdown"),
        (METADATA + MARKDOWN + "```\n[a](b)\n```\n[a](nbs/c.ipynb)", "link nbs/c.ipynb leads"),
    ],
)
def test_faults_of_a_description_are_named(tmp_path, text, said):
    assert wheel.describe(a_wheel(tmp_path / "good.whl", [])) == []
    complaints = wheel.describe(a_wheel(tmp_path / "bad.whl", [], text))
    assert len(complaints) == 1 and said in complaints[0]


def test_a_tree_in_reach_is_named(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    said = wheel.check_alone(tmp_path, tmp_path, {"PYTHONPATH": str(ROOT), "PATH": ""})
    assert f"{ROOT} is searched for modules" in said
    assert f"{ROOT}/unpaired_kd/__init__.py is imported, not the installed package" in said


def test_a_step_that_fails_stops_the_gate(tmp_path):
    leave = [sys.executable, "-c", "import sys; print('told', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(wheel.Failed, match="left with 3:\\n\\n*told"):
        wheel.call(leave, tmp_path)
    assert wheel.call(leave, tmp_path, status=3) == "told\n"
