"Stored results in words of earlier versions: each is read in today's, and shown the same."

import json
from pathlib import Path

import pytest

from unpaired_kd.core import InputError, read_csv
from unpaired_kd.methods.registry import method_class, options_of
from unpaired_kd.study import earlier
from unpaired_kd.study.arms import Arm, list_arms, record_now
from unpaired_kd.study.config import PART_OF, flat_now, read_study
from unpaired_kd.study.earlier import arm_in_todays_words, read_table, row_in_todays_words
from unpaired_kd.study.rows import load_rows

RESULTS = Path(__file__).parents[1] / "nbs/results"
CONFIGS = sorted(RESULTS.glob("*/*/config.json"))
STUDIES = [p for p in CONFIGS if "arms" in json.loads(p.read_text())]
TABLES = sorted(RESULTS.glob("**/*.csv"))


def name_of(path):
    return str(path.relative_to(RESULTS).parent)


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_every_stored_arm_is_one_of_today(path):
    record = json.loads(path.read_text())
    config = read_study(record["study"], record["arms"])
    assert [arm.name for arm in config.arms] == list(record["arms"])  # names stay
    for arm in config.arms:
        old = record["arms"][arm.name]
        method = method_class(arm.method)
        options = options_of(arm.method, arm.preset, arm.options, config.patches.patch)
        assert set(arm.weights) <= set(method.default_weights(options))
        assert (arm.start == "scratch") == (old["init"] == "scratch")
        assert arm.reuses == old.get("shares", "")
        assert list(arm.weights.values()) == list(old["weights"].values())
        assert len(arm.options) == len(old["options"])


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_every_stored_setting_is_one_of_today(path):
    settings = flat_now(json.loads(path.read_text())["study"])
    assert set(settings) == set(PART_OF)


@pytest.mark.parametrize("path", TABLES, ids=lambda p: str(p.relative_to(RESULTS)))
def test_every_stored_table_is_read_with_its_numbers(path):
    old = read_csv(path)
    new = read_table(path)
    assert len(new) == len(old) > 0
    for before, now in zip(old, new):
        assert [v for v in before.values() if not isinstance(v, str)] == [
            v for v in now.values() if not isinstance(v, str)
        ]
        assert len(before) == len(now)
    if path.name == "metrics.csv":
        assert {r["arm"] for r in load_rows(path)} == {r["arm"] for r in old}


@pytest.mark.parametrize(
    "old,start",
    [
        (dict(init="scratch", start="true"), "scratch"),
        (dict(init="teacher", start="true"), "teacher"),
        (dict(init="teacher", start="placebo"), "placebo"),
        (dict(init="teacher", teacher="placebo"), "placebo"),
        (dict(init="teacher"), "teacher"),
        (dict(start="placebo"), "placebo"),
    ],
)
def test_whose_weights_an_arm_of_an_earlier_version_starts_from(old, start):
    assert arm_in_todays_words(old)["start"] == start and "init" not in arm_in_todays_words(old)


def test_a_record_without_the_newer_fields_has_their_usual_values():
    assert record_now({"method": "single", "shares": "R00"}) == {
        "method": "single",
        "start": "scratch",
        "teacher": "true",
        "preset": "recommended",
        "options": {},
        "weights": {},
        "reuses": "R00",
    }
    assert record_now(Arm("a", "single").record()) == Arm("a", "single").record()
    assert record_now(None) is None


@pytest.mark.parametrize("old", [dict(init="teacher"), dict(shares="a")])
def test_a_user_writes_todays_words(old):
    with pytest.raises(InputError, match="unknown key"):
        list_arms({"a": dict(method="single"), "b": dict(method="single", **old)})


WORDS = """
setting  *        old_lr    lr
field    *        shares    reuses
method   *        teach     lotus
option   lotus    heat      tau
term     lotus    road      ifv
term     *        judge     adv
word     seg      home      dice
column   *        critic    discriminator
"""


@pytest.fixture
def words(monkeypatch):
    "Another table, which has every kind of word."
    monkeypatch.setattr(earlier, "EARLIER", WORDS)
    earlier._words.cache_clear()
    yield
    earlier._words.cache_clear()


def test_every_kind_of_word_is_mapped_where_it_belongs(words):
    arm = dict(
        method="teach", options={"heat": 4, "seg": "home"}, weights={"road": 1, "judge": 2, "x": 3}
    )
    assert arm_in_todays_words(arm) == dict(
        method="lotus", options={"tau": 4, "seg": "dice"}, weights={"ifv": 1, "adv": 2, "x": 3}
    )
    other = dict(method="single", options={"heat": 4}, weights={"road": 1, "judge": 2})
    assert arm_in_todays_words(other) == dict(  # the words of one method are not another's
        method="single", options={"heat": 4}, weights={"road": 1, "adv": 2}
    )
    row = dict(arm="teach", critic=1.0, road=2.0, seg="home", dsc=0.5)
    assert row_in_todays_words(row) == dict(  # an arm may have any name
        arm="teach", discriminator=1.0, ifv=2.0, seg="dice", dsc=0.5
    )
    assert list(row_in_todays_words(row)) == ["arm", "discriminator", "ifv", "seg", "dsc"]
    assert earlier.settings_in_todays_words({"old_lr": 0.1, "preset": "x"}) == {"lr": 0.1}


def test_no_word_is_both_old_and_of_today():
    lines = [line.split() for line in earlier.EARLIER.strip().splitlines()]
    assert all(len(line) == 4 for line in lines)
    assert not {tuple(line[:3]) for line in lines} & {(a, b, d) for a, b, _, d in lines}
    kinds = {line[0] for line in lines}
    assert kinds <= {"setting", "field", "method", "option", "word", "term", "column"}
