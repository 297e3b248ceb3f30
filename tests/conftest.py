"""Shared by all tests: where the optional real images are, and one thread."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# sums over pixels depend on it; a study trains with one as well
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("UKD_DATA") or ROOT.parent / "shared" / "data")


def pytest_configure(config):
    """Tiny runs always end LOTUS's first stage at its cap; the tests that look at this warning ask
    for it."""
    config.addinivalue_line("filterwarnings", "ignore:stage .* ended at its cap")


def pytest_runtest_setup(item):
    "What is marked `gpu` needs a device."
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def real_data():
    """`real_data(name)` is the folder of a set of real images; without it, the test is skipped.
    UKD_DATA names the folder that holds the sets."""

    def find(name):
        if not (DATA / name).is_dir():
            pytest.skip(f"no {name} in {DATA}: set UKD_DATA")
        return DATA / name

    return find


@pytest.fixture
def run_folder(tmp_path):
    "A path for a run folder that does not exist yet."
    return tmp_path / "runs" / "test"
