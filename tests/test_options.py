"""Every option of every method: what is not finite, out of its range or no word of it is refused
before anything is built."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
import pytest

from unpaired_kd.core import Checked, InputError, Range, as_python
from unpaired_kd.methods.registry import all_methods, options_of

WITH = {
    name: options_of(name, "recommended", {}, 48)
    for name, cls in all_methods().items()
    if cls.Options
}
REALS = [
    (m, f.name) for m, o in WITH.items() for f in fields(o) if type(getattr(o, f.name)) is float
]


def refused(method, option, value, patch=48):
    with pytest.raises(InputError, match=option):
        options_of(method, "recommended", {option: value}, patch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("method,option", REALS, ids=lambda v: v)
def test_no_real_option_may_be_nan_infinite_or_negative(method, option, value):
    refused(method, option, value)


@pytest.mark.parametrize(
    "method,option,bad",
    [
        ("lotus", "tau", 0),
        ("lotus", "side", 0),
        ("lotus", "stride", 49),
        ("lotus", "stride", 10**12),
        ("lotus", "quantiles", 10**9),
        ("lotus", "eta", 1.01),
        ("ummkd", "tau", 0),
        ("ummkd", "kl_direction", "x"),
        ("ummkd", "ce", "x"),
        ("cmedl", "beta1", 1.0),
        ("cmedl", "blocks", 10**12),
        ("cmedl", "width", 0),
        ("cmedl", "smooth", 0.0),
        ("cmedl", "cx_sample", -1),
        ("cmedl", "hint", "x"),
        ("mutual", "cx_on", "x"),
        ("mutual", "kd_tau", 0.0),
        ("fusion", "side", 0),
        ("vpbsd", "decay", 1.0),
        ("vpbsd", "decoder", 0),
        ("vpbsd", "doubt", 0.5),
        ("vpbsd", "codes", 0),
        ("reconstruction", "decoder", 0),
        ("reconstruction", "unlabelled", False),
        ("recalibrated", "batches", 0),
        ("recalibrated", "unlabelled", False),
    ],
)
def test_numbers_and_words_outside(method, option, bad):
    refused(method, option, bad)


@pytest.mark.parametrize(
    "method,option,good",
    [
        ("lotus", "stride", 48),
        ("lotus", "eta", 1),
        ("lotus", "delta", 0),
        ("lotus", "denoise_share", 1.0),
        ("ummkd", "ce_weight", 0.0),
        ("ummkd", "kl_direction", "reverse"),
        ("cmedl", "beta1", 0.0),
        ("cmedl", "pool", 0),
        ("cmedl", "blocks", 0),
        ("vpbsd", "mask", 0.0),
        ("vpbsd", "doubt", 0.49),
        ("reconstruction", "bce", np.float32(0)),
        ("recalibrated", "batches", np.int64(3)),
    ],
)
def test_the_ends_of_the_ranges_are_inside(method, option, good):
    assert getattr(options_of(method, "recommended", {option: good}, 48), option) == good


def test_the_presets_are_inside():
    for name, cls in all_methods().items():
        for preset, stated in cls.presets.items():
            assert options_of(name, preset, {}, 48) == cls.fit(stated, 48)


def test_the_side_of_pooled_features():
    assert options_of("lotus", "recommended", {"stride": 4}, 96).side == 24
    assert options_of("lotus", "recommended", {"stride": 4, "side": 7}, 96).side == 7
    with pytest.raises(InputError, match="stride=97"):
        options_of("lotus", "recommended", {"stride": 97, "side": 7}, 96)


def test_ranges():
    for r, inside, outside in [
        (Range(least=0, most=1), (0, 0.5, 1), (-0.1, 1.1)),
        (Range(above=0, below=1), (0.5, 1e-9), (0, 1)),
        (Range(), (-9, 9), ()),
    ]:
        assert all(v in r for v in inside) and not any(v in r for v in outside)
    assert (
        str(Range(above=0, most=1)) == "above 0 and at most 1"
        and math.nan not in Range(least=0)
        and math.nan not in Range(below=1)
    )


def test_settings_without_a_range_must_be_finite():
    @dataclass(frozen=True)
    class S(Checked):
        a: float = 1.0
        b: Annotated[int, Range(most=3)] = 3
        c: Literal["x", "y"] = "x"

    assert S(c="y").c == "y" and S(a=2) == S(a=2.0)
    for bad, words in [
        (dict(a=math.nan), "a=nan"),
        (dict(a=-math.inf), "a=-inf"),
        (dict(b=4), "b=4: give a number that is at most 3"),
        (dict(c="z"), "c 'z'"),
    ]:
        with pytest.raises(InputError, match=words):
            S(**bad)


def test_python_of_numpy():
    given = {
        "a": np.float32(0.5),
        "b": [np.int8(1), (np.bool_(False), "t")],
        "c": np.eye(2, dtype=int),
        "d": None,
    }
    plain = as_python(given)
    assert plain == {"a": 0.5, "b": [1, (False, "t")], "c": [[1, 0], [0, 1]], "d": None}
    assert [type(plain["a"]), type(plain["b"][0]), type(plain["b"][1][0])] == [float, int, bool]
