"""What `import unpaired_kd` offers, and what it costs."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import unpaired_kd

HEAVY = ("torch", "numpy", "scipy", "monai", "matplotlib", "papermill", "IPython")
LOOK = f"""
import sys, unpaired_kd
heavy = [m for m in {HEAVY} if m in sys.modules]
before = [m for m in sys.modules if m.startswith("unpaired_kd.")]
assert {{"Student", "Collection", "run_study", "__version__"}} <= set(dir(unpaired_kd))
try: unpaired_kd.Studnet
except AttributeError: pass
print(heavy, before, [m for m in {HEAVY} if m in sys.modules])
"""


def test_importing_and_looking_brings_nothing_in():
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert done.stdout.strip() == "[] [] []", done.stderr


@pytest.mark.parametrize("name", sorted(unpaired_kd.HOMES))
def test_what_is_offered_is_the_object_itself(name):
    home = import_module(f"unpaired_kd.{unpaired_kd.HOMES[name]}")
    assert getattr(unpaired_kd, name) is getattr(home, name)


def test_all_dir_and_a_star_agree():
    space = {}
    exec("from unpaired_kd import *", space)
    assert set(space) - {"__builtins__"} == set(unpaired_kd.__all__) == set(unpaired_kd.HOMES)
    assert set(unpaired_kd.__all__) <= set(dir(unpaired_kd))


def test_a_type_checker_sees_the_same_names():
    tree = ast.parse(Path(unpaired_kd.__file__).read_text())
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    seen = {a.name: n.module for n in inside for a in n.names}
    assert seen == unpaired_kd.HOMES
    assert (Path(unpaired_kd.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "name, said",
    [
        ("Studnet", "Did you mean Student?"),
        ("collection", "Did you mean Collection?"),
        ("run_studies", "Did you mean run_study?"),
        ("zzz", "It offers Collection, Student, run_study."),
    ],
)
def test_a_mistyped_name_is_told_the_nearest(name, said):
    with pytest.raises(AttributeError) as e:
        getattr(unpaired_kd, name)
    assert str(e.value) == f"unpaired_kd has no {name!r}. {said}"
    assert not hasattr(unpaired_kd, name)
