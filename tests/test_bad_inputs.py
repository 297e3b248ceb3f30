"""Bad input of every kind: a short message that names the file or the argument, never a traceback,
and no file changed or left.

A row is (name, what to prepare, arguments of `ukd`, what the message must say). To add one, write
it into the table of its command; `check_bad` does the rest. It runs the command in this process, in
a folder that `prepare` has filled."""

import contextlib
import functools
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from unpaired_kd.command import cli
from unpaired_kd.core import InputError, rng, seeded
from unpaired_kd.data.formats.images import Image
from unpaired_kd.data.formats.writing import write_image
from unpaired_kd.inference.files import predict_path
from unpaired_kd.inference.student import Recipe, Student
from unpaired_kd.inference.volumes import predict_volume
from unpaired_kd.networks.registry import make_network

START = "import sys; from unpaired_kd.command.cli import main; sys.exit(main(sys.argv[1:]))"
PARAMETERS = '''steps: int = 2  # how many
rate: float = 0.5
name: str = "x"
deep: bool = False
names: list[str] = []
sizes: list[int] = [1]
weights: dict[str, float] = {"kl": 1.0, "ifv": 1.0}
options: dict = {}
net: dict = {"width": 8, "inner": {"codes": 4}}
crop: int | None = None
run_folder: str = ""'''
HEADER = "arm,seed,collection,case,group,dsc\n"
SCORES = HEADER + "".join(
    f"{arm},0,c,{case},{case},0.{5 + i}\n"
    for i, arm in enumerate(("alone", "kl"))
    for case in "xyz"
)


# ---------------------------------------------------------------- the frame


def notebook(source, tag="parameters"):
    "The text of a notebook of two cells; were it run, it would leave a file."
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={"tags": [tag]} if i == 0 else {},
            source=s,
            outputs=[],
            execution_count=None,
        )
        for i, s in enumerate([source, "open('executed', 'w').close()"])
    ]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


def prepare(place):
    """What every row finds: a notebook, a grid, two runs with scores, a folder and a file of
    somebody else."""
    for name in ("run", "same/run", "thesis"):
        (place / name).mkdir(parents=True)
    (place / "n.ipynb").write_text(notebook(PARAMETERS), encoding="utf-8")
    (place / "g.yaml").write_text("notebook: ./n.ipynb\ngrid: {steps: [1, 2]}\n", encoding="utf-8")
    for name in ("run", "same/run"):
        (place / name / "metrics.csv").write_text(SCORES, encoding="utf-8")
    (place / "thesis/thesis.tex").write_text("years of work", encoding="utf-8")
    (place / "file").write_text("a file", encoding="utf-8")


def tree(place):
    "All that lies in a folder: path -> kind, permissions and content."
    found = {}
    for path in sorted(place.rglob("*")):
        mode = path.lstat().st_mode
        content = (
            path.read_bytes()
            if stat.S_ISREG(mode)
            else os.readlink(path)
            if stat.S_ISLNK(mode)
            else None
        )
        found[str(path.relative_to(place))] = (mode, content)
    return found


def call(arguments, place):
    "`ukd` in this process: (exit status, standard error)."
    error = io.StringIO()
    with (
        contextlib.chdir(place),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(error),
    ):
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as e:
            status = e.code  # argparse
    return status, error.getvalue()


def check_message(error, says):
    "A message is short, says what it must, and is no traceback."
    message = error.split("\nParameters of ")[
        0
    ].strip()  # the list of parameters is help, not message
    assert "Traceback" not in error, error
    assert re.search(says, message), f"{says!r} is not in {message!r}"
    assert len(message) < 900 and len(re.findall(r"[.?!] +[A-Z-]", message)) < 4, message


def check_bad(arguments, says, place):
    "The command is refused with a message, and changes nothing in its folder."
    before = tree(place)
    status, error = call(arguments, place)
    assert status in (1, 2), f"exit status {status}: {error}"
    check_message(error, says)
    assert tree(place) == before


def write(name, content):
    "Prepare: one more file, of text or bytes."

    def make(place):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def cells(source):
    return write("n.ipynb", notebook(source))


def grid(text):
    return write("g.yaml", "notebook: ./n.ipynb\n" + text)


def scores(text):
    return write("run/metrics.csv", text)


def folder(name):
    def make(place):
        (place / name).mkdir(parents=True)

    return make


def fifo(name):
    def make(place):
        os.mkfifo(place / name)

    return make


def link(name, target):
    def make(place):
        (place / name).symlink_to(target)

    return make


def record(**parameters):
    "Prepare: a run folder `done` that was made with these parameters."
    return write("done/parameters.json", json.dumps(dict(notebook="n", **parameters)))


def given(*pairs):
    "Arguments: `ukd run` with parameters."
    return [
        "run",
        "./n.ipynb",
        "--out",
        "out",
        *(a for k, v in zip(pairs[::2], pairs[1::2]) for a in ("-p", k, v)),
    ]


def filed(*files):
    "Arguments: `ukd run` with files of parameters."
    return ["run", "./n.ipynb", "--out", "out", *(a for f in files for a in ("-f", f))]


def out(name):
    return ["run", "./n.ipynb", "--out", name]


BOMB = (
    "{a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1], "
    + ", ".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi"))
    + "}"
)

# ---------------------------------------------------------------- ukd run: parameters

RUN = [
    ("name misspelt", None, given("stepz", "3"), "'stepz'.*Did you mean 'steps'"),
    ("name empty", None, given("", "3"), "unknown parameter ''"),
    ("name of a method", None, given("__class__", "3"), "unknown parameter '__class__'"),
    ("run folder as a parameter", None, given("run_folder", "x"), "--out"),
    ("given twice", None, given("steps", "1", "steps", "1"), "'steps' is given twice"),
    (
        "dict and its entry",
        None,
        given("options.x", "1", "options", "{x: 2}"),
        "'options.x' and 'options' set the same",
    ),
    (
        "entry and deeper entry",
        None,
        given("options.a", "1", "options.a.b", "2"),
        "'options.a' and 'options.a.b'",
    ),
    ("entry misspelt", None, given("weights.kll", "0"), "Did you mean 'kl'"),
    (
        "deep entry misspelt",
        None,
        given("net.inner.code", "0"),
        "'net.inner'.*Did you mean 'codes'",
    ),
    ("entry of a number", None, given("steps.x", "1"), "'steps' is no dict"),
    ("entry below a number", None, given("net.width.x", "1"), "'net.width' is no dict"),
    ("entry without a name", None, given("options.", "1"), "entry of 'options' ''"),
    ("entry of another type", None, given("weights.kl", "big"), "'weights.kl' takes float"),
    (
        "deep entry of another type",
        None,
        given("net.inner.codes", "many"),
        "'net.inner.codes' takes int",
    ),
    ("int: word", None, given("steps", "three"), "'steps' takes int.*'three'"),
    ("int: nothing", None, given("steps", ""), "'steps' takes int.*''"),
    ("int: real", None, given("steps", "1.5"), "'steps' takes int"),
    ("int: whole real", None, given("steps", "2.0"), "'steps' takes int"),
    ("int: exponent", None, given("steps", "1e3"), "'steps' takes int"),
    ("int: leading zero", None, given("steps", "010"), "'010'"),
    ("int: clock", None, given("steps", "1:30"), "'1:30'"),
    ("int: underscore", None, given("steps", "1_000"), "'1_000'"),
    ("int: comma", None, given("steps", "1,000"), "'steps' takes int"),
    ("int: binary", None, given("steps", "0b11"), "'0b11'"),
    ("int: other digits", None, given("steps", "٣"), "'steps' takes int"),
    ("int: in quotes", None, given("steps", "'5'"), "without quotes"),
    ("int: truth value", None, given("steps", "true"), "'steps' takes int"),
    ("int: list", None, given("steps", "[1]"), "'steps' takes int"),
    ("int: too many digits", None, given("steps", "9" * 5000), "too many digits"),
    ("int or nothing: nothing", None, given("crop", ""), "'crop' takes int . None"),
    ("int or nothing: word", None, given("crop", "none"), "'crop' takes int . None"),
    ("float: word", None, given("rate", "fast"), "'rate' takes float"),
    ("float: NaN", None, given("rate", ".nan"), "not a number"),
    ("float: nan", None, given("rate", "nan"), "'rate' takes float"),
    ("float: comma", None, given("rate", "0,5"), "'rate' takes float"),
    ("float: too large", None, given("rate", "1e999"), "too large"),
    ("float: huge whole number", None, given("rate", "9" * 400), "too large"),
    ("float: date", None, given("rate", "2024-01-01"), "'2024-01-01'"),
    ("float: per cent", None, given("rate", "5%"), "'rate' takes float"),
    ("bool: number", None, given("deep", "1"), "'deep' takes bool"),
    ("bool: word", None, given("deep", "maybe"), "'deep' takes bool"),
    ("bool: in quotes", None, given("deep", "'yes'"), "without quotes"),
    ("list: not closed", None, given("sizes", "[1"), "not valid YAML"),
    ("list: single value", None, given("sizes", "1"), "'sizes' takes list"),
    ("list: of words", None, given("sizes", "[1, x]"), "'sizes' takes list"),
    ("list: of leading zeros", None, given("sizes", "[007]"), "'007'"),
    ("list: of truth values", None, given("sizes", "[true]"), "'sizes' takes list"),
    ("list of names: nested", None, given("names", "[[a]]"), "'names' takes list"),
    ("dict: list", None, given("options", "[a]"), "'options' takes dict"),
    ("dict: key twice", None, given("options", "{a: 1, a: 2}"), "'a'.*stands twice"),
    ("dict: key twice, deep", None, given("options", "{b: {a: 1, 'a': 2}}"), "'a'.*stands twice"),
    (
        "dict: keys of two kinds",
        None,
        given("options", "{1: a, b: c}"),
        "keys are text and numbers",
    ),
    ("dict: list as a key", None, given("options", "{[a]: 1}"), "A key is text"),
    ("dict: off as a key", None, given("options", "{off: 1}"), "'off'"),
    ("dict: date", None, given("options", "{a: 2024-01-01}"), "'2024-01-01'"),
    ("dict: off", None, given("options.seg", "off"), "'off'"),
    ("dict: set", None, given("options", "!!set {a}"), "tags"),
    ("dict: binary", None, given("options", "{a: !!binary aGk=}"), "tags"),
    (
        "dict: Python object",
        None,
        given("options", "{a: !!python/object/apply:os.system [touch executed]}"),
        "tags",
    ),
    ("dict: loop", None, given("options", "&x {a: *x}"), "anchors"),
    ("dict: merge key", None, given("options", "{<<: {a: 1}}"), "not merged with <<"),
    ("dict: bomb", None, given("options", BOMB), "anchors"),
    ("dict: two documents", None, given("options", "a: 1\n---\nb: 2"), "not valid YAML"),
    ("dict: control character", None, given("options", "{a: \x07}"), "control character"),
    (
        "dict: half a pair of surrogates",
        None,
        given("options", r'{a: "\ud83d"}'),
        "broken character",
    ),
    ("dict: deep", None, given("options", "[" * 2000 + "]" * 2000), "nested"),
    ("dict: long", None, given("options", "[" + "1, " * 100000 + "]"), "longer than"),
    (
        "str: bytes that are no UTF-8",
        None,
        given("name", os.fsdecode(b"caf\xe9")),
        "'name'.*broken character",
    ),
    (
        "parameter without a value",
        None,
        ["run", "./n.ipynb", "-p", "steps"],
        "-p: write name and value apart",
    ),
    ("unknown option", None, ["run", "./n.ipynb", "--epochs", "3"], "--epochs"),
    (
        "option misspelt",
        None,
        ["run", "./n.ipynb", "--ot", "x"],
        "unknown option '--ot'. Did you mean '--out'",
    ),
    (
        "option by its first letters",
        None,
        ["run", "./n.ipynb", "--exten"],
        "unknown option '--exten'. Did you mean '--extend'",
    ),
    (
        "option with its value",
        None,
        ["run", "./n.ipynb", "--otu=x"],
        "unknown option '--otu'. Did you mean '--out'",
    ),
    ("two notebooks", None, ["run", "./n.ipynb", "./m.ipynb"], "'./m.ipynb' is one word too many"),
    # files of parameters
    ("file absent", None, filed("absent.yaml"), "absent.yaml does not exist"),
    ("file is a folder", None, filed("thesis"), "thesis is a folder"),
    ("file is binary", write("p.yaml", bytes(range(256))), filed("p.yaml"), "p.yaml is not UTF-8"),
    ("file is a list", write("p.yaml", "- steps"), filed("p.yaml"), "p.yaml must be a mapping"),
    (
        "file with a name misspelt",
        write("p.yaml", "stepz: 3"),
        filed("p.yaml"),
        "p.yaml: unknown parameter 'stepz'. Did you mean 'steps'",
    ),
    (
        "file with an entry misspelt",
        write("p.yaml", "weights.kll: 3"),
        filed("p.yaml"),
        "p.yaml: unknown entry of 'weights' 'kll'. Did you mean 'kl'",
    ),
    (
        "file with a word for a number",
        write("p.yaml", "steps: three"),
        filed("p.yaml"),
        "p.yaml: parameter 'steps' takes int",
    ),
    (
        "file with a number in quotes",
        write("p.yaml", "steps: '3'"),
        filed("p.yaml"),
        "p.yaml: parameter 'steps'.*without quotes",
    ),
    (
        "file with a number for text",
        write("p.yaml", "name: 7"),
        filed("p.yaml"),
        "p.yaml: parameter 'name'.*in quotes",
    ),
    (
        "file with off for text",
        write("p.yaml", "name: off"),
        filed("p.yaml"),
        "p.yaml: parameter 'name'.*in quotes",
    ),
    (
        "file with a key twice",
        write("p.yaml", "steps: 1\nsteps: 2"),
        filed("p.yaml"),
        r"p.yaml: 'steps' \(line 2\) stands twice",
    ),
    (
        "file with off as a key",
        write("p.yaml", "off: 1"),
        filed("p.yaml"),
        "p.yaml: the key 'off' is not text",
    ),
    (
        "file with a run folder",
        write("p.yaml", "run_folder: x"),
        filed("p.yaml"),
        "p.yaml: .*--out",
    ),
    (
        "file with a dict and its entry",
        write("p.yaml", "options.x: 1\noptions: {x: 2}"),
        filed("p.yaml"),
        "p.yaml: 'options.x' and 'options'",
    ),
    (
        "file that undoes another",
        lambda place: (
            write("p.yaml", "options.x: 1")(place),
            write("q.yaml", "options: {y: 2}")(place),
        ),
        filed("p.yaml", "q.yaml"),
        "q.yaml: 'options' would undo 'options.x'",
    ),
    (
        "parameter that undoes a file",
        write("p.yaml", "options.x: 1"),
        [*filed("p.yaml"), "-p", "options", "{y: 2}"],
        "'options' would undo 'options.x'",
    ),
    (
        "file with a tag",
        write("p.yaml", "name: !!python/name:os.system"),
        filed("p.yaml"),
        "p.yaml.*tags",
    ),
    (
        "file with a tab",
        write("p.yaml", "options:\n\tx: 1"),
        filed("p.yaml"),
        "p.yaml.*not valid YAML.*line 2",
    ),
    (
        "file with a bomb",
        write("p.yaml", f"options: {BOMB}"),
        filed("p.yaml"),
        "p.yaml.*repeat more",
    ),
    # the notebook
    ("notebook absent", None, ["run", "./absent.ipynb"], "absent.ipynb does not exist"),
    ("experiment unknown", None, ["run", "lotos"], "unknown experiment 'lotos'"),
    ("notebook without a name", None, ["run", ""], "unknown experiment ''"),
    ("notebook is a folder", folder("f.ipynb"), ["run", "./f.ipynb"], "f.ipynb is a folder"),
    (
        "notebook is a pipe",
        fifo("p.ipynb"),
        ["run", "./p.ipynb"],
        "p.ipynb is neither a file nor a folder, but a pipe",
    ),
    (
        "notebook is a dangling link",
        link("l.ipynb", "gone.ipynb"),
        ["run", "./l.ipynb"],
        "l.ipynb is a link to gone.ipynb, which is not there",
    ),
    ("notebook is binary", write("n.ipynb", bytes(range(256))), out("out"), "n.ipynb is not UTF-8"),
    ("notebook is empty", write("n.ipynb", ""), out("out"), "n.ipynb is not a notebook"),
    ("notebook is a list", write("n.ipynb", "[1]"), out("out"), "n.ipynb is not a notebook"),
    (
        "notebook is cut",
        write("n.ipynb", notebook(PARAMETERS)[:300]),
        out("out"),
        "n.ipynb is not a notebook",
    ),
    (
        "notebook of odd cells",
        write("n.ipynb", '{"cells": [1]}'),
        out("out"),
        "n.ipynb is not a notebook",
    ),
    (
        "notebook of the future",
        write("n.ipynb", notebook(PARAMETERS).replace('"nbformat": 4', '"nbformat": 9')),
        out("out"),
        "n.ipynb is not a valid notebook",
    ),
    (
        "notebook with an unknown kind of cell",
        write("n.ipynb", notebook(PARAMETERS).replace('"code", "id": "c1"', '"poem", "id": "c1"')),
        out("out"),
        "n.ipynb is not a valid notebook",
    ),
    ("no tag", write("n.ipynb", notebook(PARAMETERS, tag="other")), out("out"), "0 cells tagged"),
    ("no run folder", cells("steps: int = 1"), out("out"), "run_folder"),
    (
        "cell is no Python",
        cells("steps: int ="),
        out("out"),
        "n.ipynb: the parameters cell is not valid Python",
    ),
    ("cell with a loop", cells("for i in []: pass"), out("out"), "line 1: write"),
    ("cell with a call", cells("steps: int = len('x')"), out("out"), "line 1: write"),
    ("cell with bytes", cells("steps = b'x'"), out("out"), "line 1: write"),
    ("cell with a set", cells("steps = {1}"), out("out"), "line 1: write"),
    # the run folder
    ("out is a file", None, out("file"), "--out.*file"),
    ("out below a file", None, out("file/run"), "--out.*file/run"),
    ("out without a name", None, out(""), "--out"),
    ("out of somebody else", None, out("thesis"), "thesis.tex"),
    (
        "out with a long name",
        None,
        out("new/" + "x" * 300),
        "--out.*name too long|--out.*File name",
    ),
    ("out that is no UTF-8", None, out(os.fsdecode(b"caf\xe9")), "--out.*UTF-8"),
    ("out where nothing can be", None, out("/proc/run"), "--out.*/proc/run"),
    ("out is a dangling link", link("gone", "nowhere/below"), out("gone"), "--out.*gone"),
    (
        "out with another program's config.json",
        write("hf/config.json", '{"model_type": "bert"}'),
        out("hf"),
        "--out: hf.*config.json",
    ),
    (
        "out with a list as config.json",
        write("hf/config.json", "[]"),
        out("hf"),
        "--out: hf.*config.json",
    ),
    (
        "out with a broken config.json",
        write("hf/config.json", "{"),
        out("hf"),
        "hf/config.json is not valid JSON",
    ),
    (
        "out with another program's parameters.json",
        write("hf/parameters.json", '{"lr": 1}'),
        out("hf"),
        "hf/parameters.json is not the record",
    ),
    (
        "out with a list as parameters.json",
        write("hf/parameters.json", "[1]"),
        [*out("hf"), "--extend"],
        "hf/parameters.json is not the record",
    ),
    (
        "out with a broken parameters.json",
        write("hf/parameters.json", "{"),
        out("hf"),
        "hf/parameters.json is not valid JSON",
    ),
    ("out of another run", record(steps=1), out("done"), "done was made with other parameters"),
    (
        "out of a sweep",
        write("s/parameters.json", '{"sweep": "g"}'),
        [*out("s"), "--extend"],
        "s/parameters.json is not the record",
    ),
]

# ---------------------------------------------------------------- ukd check


def sound(place):
    "A data set of two modalities, each with three images of 24 x 24 pixels and labels 0 to 2."
    for k, modality in enumerate(("ct", "mr")):
        for i in range(3):
            name = f"{modality}/{{}}/{modality}{i}.png"
            picture(name.format("images"), rng(0, "bad", 3 * k + i).integers(0, 255, (24, 24)))(
                place
            )
            picture(name.format("labels"), np.arange(576).reshape(24, 24) // 30 % 3)(place)
        write(f"{modality}/groups.csv", f"id,group\n{modality}0,a\n{modality}1,b\n{modality}2,c\n")(
            place
        )


def picture(name, numbers):
    "Prepare: a PNG of 8 bits."
    from PIL import Image

    found = io.BytesIO()
    Image.fromarray(np.asarray(numbers).astype(np.uint8)).save(found, format="png")
    return write(name, found.getvalue())


def after(*steps):
    "Prepare: a sound data set in `data`, and then these steps in it."

    def make(place):
        sound(place / "data")
        for step in steps:
            step(place / "data")

    return make


def gone(name):
    return lambda place: (place / name).unlink()


def manifest(*changes):
    "Prepare: the sound data set with a manifest, in which texts are replaced by others."
    rows = [
        f"{m},{m}{i},{m}/images/{m}{i}.png,{m}/labels/{m}{i}.png,{g}"
        for m in ("ct", "mr")
        for i, g in enumerate("abc")
    ]
    text = "modality,id,image,label,group\n" + "\n".join(rows) + "\n"
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return after(write("manifest.csv", text))


CHECK = [
    (name, ready, ["check", "data", *more], says)
    for name, ready, more, says in [
        ("data are absent", None, [], "data is not a folder"),
        ("data are a file", write("data", "x"), [], "data is not a folder"),
        ("data are a pipe", fifo("data"), [], "data is not a folder"),
        ("data are a dangling link", link("data", "nowhere"), [], "data is not a folder"),
        ("data are empty", folder("data"), [], "data holds no images"),
        ("data of another program", folder("data/imagesTr"), [], "nnU-Net"),
        ("modality misspelt", after(), ["ctt"], "unknown modality 'ctt'. Did you mean 'ct'"),
        ("modality is a path", after(), ["../data/ct"], "unknown modality"),
        (
            "kind misspelt",
            after(),
            ["--label-kind", "instances"],
            "--label-kind.*'instances'.*Did you mean 'instance'",
        ),
        (
            "pictures among the data",
            after(),
            ["--out", "data/ct/images"],
            "--out: data/ct/images lies in data",
        ),
        ("pictures in the data", after(), ["--out", "data"], "--out: data lies in data"),
        ("pictures into a file", after(), ["--out", "file"], "file is not a folder"),
        ("pictures below a file", after(), ["--out", "file/x"], "file is not a folder"),
        ("pictures without a name", after(), ["--out", ""], "--out: the name is empty"),
        (
            "pictures where nothing can be",
            after(),
            ["--out", "/proc/x"],
            "cannot write into /proc/x",
        ),
        (
            "pictures that are there",
            lambda place: (after()(place), write("out/mr.png", "mine")(place)),
            ["--out", "out"],
            "out/mr.png is there already",
        ),
        (
            "two image folders",
            after(folder("images"), folder("imgs")),
            [],
            "data holds images and imgs",
        ),
        (
            "manifest in another encoding",
            after(write("manifest.csv", "modality,id,image\nct,ü,x\n".encode("cp1252"))),
            [],
            "manifest.csv is not UTF-8.*Excel",
        ),
        (
            "manifest in UTF-16 without a mark",
            after(write("manifest.csv", "modality,id,image\nct,a,x\n".encode("utf-16-le"))),
            [],
            "manifest.csv holds zero bytes",
        ),
        ("manifest is a folder", after(folder("manifest.csv")), [], "manifest.csv is a folder"),
        (
            "manifest is a pipe",
            after(fifo("manifest.csv")),
            [],
            "manifest.csv is neither a file nor a folder, but a pipe",
        ),
        (
            "manifest is a dangling link",
            after(link("manifest.csv", "gone.csv")),
            [],
            "manifest.csv",
        ),
        ("manifest is empty", after(write("manifest.csv", "")), [], "manifest.csv holds no rows"),
        (
            "manifest is a header",
            after(write("manifest.csv", "modality,id,image\n")),
            [],
            "manifest.csv holds no rows",
        ),
        (
            "manifest without a column",
            after(write("manifest.csv", "modality,image\nct,x\n")),
            [],
            "column 'id' is missing",
        ),
        (
            "manifest with a column twice",
            after(write("manifest.csv", "modality,id,image,id\nct,a,x,a\n")),
            [],
            "two columns are called 'id'",
        ),
        (
            "manifest with a short row",
            manifest((",ct/labels/ct1.png,b", "")),
            [],
            "manifest.csv, line 3.*3 cells and the header 5",
        ),
        ("manifest with a long row", manifest((",b", ",b,c")), [], "manifest.csv, line 3.*6 cells"),
        ("manifest with an open quote", manifest((",ct1,", ',"ct1,')), [], "quotation"),
    ]
]

FAULTY = [
    (name, ready, ["check", "data", *more], says)
    for name, ready, more, says in [
        (
            "image cut",
            after(
                lambda p: write("ct/images/ct1.png", (p / "ct/images/ct1.png").read_bytes()[:99])(p)
            ),
            [],
            "ct1.png.*damaged",
        ),
        (
            "label is text",
            after(write("ct/labels/ct1.png", "x")),
            [],
            "labels/ct1.png.*neither PNG nor JPEG",
        ),
        (
            "image is a folder",
            after(gone("ct/images/ct1.png"), folder("ct/images/ct1.png")),
            [],
            "images/ct1.png is a folder",
        ),
        (
            "label is a pipe",
            after(gone("ct/labels/ct1.png"), fifo("ct/labels/ct1.png")),
            [],
            "labels/ct1.png is neither a file",
        ),
        (
            "image is a dangling link",
            after(gone("ct/images/ct1.png"), link("ct/images/ct1.png", "x")),
            [],
            "images/ct1.png is a link to x",
        ),
        (
            "label says ignore",
            after(
                picture(
                    "ct/labels/ct1.png", np.array([0, 1, 255])[np.arange(576).reshape(24, 24) % 3]
                )
            ),
            [],
            "labels/ct1.png.*255 beside 1.*'ignore'",
        ),
        (
            "label with a mark",
            after(
                picture(
                    "ct/labels/ct1.png", np.array([0, 1, 99])[np.arange(576).reshape(24, 24) % 3]
                )
            ),
            [],
            "labels/ct1.png.*1-2, 99.*leave out",
        ),
        (
            "label of another size",
            after(picture("ct/labels/ct1.png", np.ones((24, 23)))),
            [],
            r"labels/ct1.png.*\(24, 23\)",
        ),
        ("label absent", after(gone("ct/labels/ct1.png")), [], "images/ct1.png has no label"),
        (
            "label twice",
            after(picture("ct/labels/CT1.png", np.ones((24, 24)))),
            [],
            "images/ct1.png has 2 labels",
        ),
        ("two label folders", after(folder("ct/masks")), [], "holds labels and masks"),
        (
            "image too small",
            after(picture("ct/images/ct1.png", np.eye(9)), picture("ct/labels/ct1.png", np.eye(9))),
            [],
            "9 x 9 pixels are too few",
        ),
        (
            "image empty",
            after(picture("ct/images/ct1.png", np.zeros((24, 24)))),
            [],
            "every pixel is 0",
        ),
        (
            "patient absent",
            after(write("ct/groups.csv", "id,group\nct0,a\nct1,b\n")),
            [],
            "no group for image 'ct2'",
        ),
        ("group pattern is none", after(), ["ct", "--group", "("], "'.'|no regular expression"),
        ("one class", after(), ["--classes", "bone"], "give a list of two names"),
        ("a class twice", after(), ["--classes", "bone", "bone"], "all different"),
        (
            "column misspelt",
            manifest(("label", "labels")),
            [],
            "column 'labels' is not known. Did you mean 'label'",
        ),
        (
            "modality in two ways",
            manifest(("ct,ct1", "CT,ct1")),
            [],
            "modality '..' is also written '..'",
        ),
        (
            "listed file absent",
            manifest(("ct/images/ct1", "ct/images/ct9")),
            [],
            "line 3 lists a file that cannot be read.*ct9",
        ),
        (
            "listed file outside",
            manifest(("ct/images/ct1", "../ct1")),
            [],
            "line 3.*leads out of data",
        ),
    ]
]


def lines(arguments, place):
    "What `ukd check` prints to standard output, and its status."
    said = io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(said):
        status = cli.main(arguments)
    return status, said.getvalue().splitlines()


@pytest.mark.parametrize(
    "arguments, ready, says", [pytest.param(a, r, s, id=n) for n, r, a, s in FAULTY]
)
def test_a_faulty_data_set_is_described_to_its_end(arguments, ready, says, tmp_path):
    prepare(tmp_path)
    ready(tmp_path)
    before = tree(tmp_path)
    status, said = lines(arguments, tmp_path)
    faults = [line for line in said if line.strip().startswith("fault: ")]
    assert status == 1 and faults and re.search(says, faults[0]), said
    assert all(len(re.findall(r"[.?!] +[A-Z-]", f.strip())) < 3 for f in faults), faults
    assert "ct" in said and re.fullmatch(
        r"\d+ faults?; --out FOLDER draws the labels on the images", said[-1]
    )
    assert tree(tmp_path) == before


# ---------------------------------------------------------------- ukd sweep

SWEEP = [
    (name, prepare_it, ["sweep", "g.yaml", "--out", "out", *more], says)
    for name, prepare_it, more, says in [
        ("grid is empty", write("g.yaml", ""), [], "g.yaml is no grid"),
        ("grid is a list", write("g.yaml", "- 1"), [], "g.yaml is no grid"),
        ("grid is text", write("g.yaml", "hello"), [], "g.yaml is no grid"),
        ("grid is binary", write("g.yaml", bytes(range(256))), [], "g.yaml is not UTF-8"),
        ("grid in UTF-16", write("g.yaml", "grid: {}".encode("utf-16")), [], "g.yaml is not UTF-8"),
        ("grid with a tab", grid("grid:\n\tsteps: [1]"), [], "g.yaml.*not valid YAML.*line 3"),
        ("grid not closed", grid("grid: {steps: [1]"), [], "g.yaml.*not valid YAML"),
        ("grid with a section misspelt", grid("gird: {steps: [1]}"), [], "Did you mean 'grid'"),
        (
            "grid with a section twice",
            grid("grid: {steps: [1]}\ngrid: {steps: [2]}"),
            [],
            r"'grid' \(line 3\) stands twice",
        ),
        (
            "grid with base twice",
            grid("base: {rate: 1}\ngrid: {steps: [1]}\nbase: {rate: 2}"),
            [],
            r"'base' \(line 4\) stands twice",
        ),
        (
            "grid with a parameter twice",
            grid("grid: {steps: [1], steps: [2]}"),
            [],
            "'steps'.*stands twice",
        ),
        (
            "grid with a bomb",
            grid(f"base: {{options: {BOMB}}}\ngrid: {{steps: [1]}}"),
            [],
            "repeat more",
        ),
        ("grid with a tag", grid("grid: {name: [!!python/name:os.system ]}"), [], "tags"),
        ("grid without rows", grid("base: {steps: 1}"), [], "g.yaml is empty"),
        ("grid of a number", grid("grid: {steps: 1}"), [], "`grid: steps` must be a list"),
        ("grid of an empty list", grid("grid: {steps: []}"), [], "at least one"),
        (
            "grid is endless",
            grid(
                "grid:\n"
                + "".join(f"  options.{c}: [{', '.join(map(str, range(20)))}]\n" for c in "abcde")
            ),
            [],
            "3200000 rows",
        ),
        ("grid with a word for a number", grid("grid: {steps: [one]}"), [], "'steps' takes int"),
        ("grid with a leading zero", grid("grid: {steps: [010]}"), [], "'010'"),
        ("grid with a quoted number", grid("grid: {steps: ['1']}"), [], "without quotes"),
        ("grid with off for text", grid("grid: {name: [off, on]}"), [], "in quotes"),
        (
            "grid with a number for text",
            grid("base: {name: 7}\ngrid: {steps: [1]}"),
            [],
            "in quotes",
        ),
        (
            "grid with a date for text",
            grid("base: {name: 2024-01-01}\ngrid: {steps: [1]}"),
            [],
            "in quotes",
        ),
        (
            "grid with a list in base",
            grid("base: {rate: [1, 2]}\ngrid: {steps: [1]}"),
            [],
            "goes under `grid`",
        ),
        (
            "grid with the same cell twice",
            grid("grid: {rate: [1e-3, 0.001]}"),
            [],
            "same parameters",
        ),
        (
            "grid with base and entry",
            grid("base: {options: {a: 1}, options.a: 2}\ngrid: {steps: [1]}"),
            [],
            "set the same thing",
        ),
        ("row named off", grid("rows: {off: {}}"), [], "'off' is not text. Write it in quotes"),
        (
            "row that is no folder's name",
            grid("rows: {a/b: {}}"),
            [],
            "'a/b' cannot name a folder",
        ),
        ("row of a number", grid("rows: {a: 3}"), [], "`rows: a` must be a mapping"),
        (
            "row and grid set the same",
            grid("rows: {a: {steps: 1}}\ngrid: {steps: [2]}"),
            [],
            "'steps'",
        ),
        (
            "notebook absent",
            write("g.yaml", "notebook: ./absent.ipynb\ngrid: {steps: [1]}"),
            [],
            "absent.ipynb does not exist",
        ),
        (
            "notebook is a list",
            write("g.yaml", "notebook: [a]\ngrid: {steps: [1]}"),
            [],
            "`notebook` must be",
        ),
        ("notebook left out", write("g.yaml", "grid: {steps: [1]}"), [], "`notebook` must be"),
        (
            "notebook of the future",
            write("n.ipynb", notebook(PARAMETERS).replace('"nbformat": 4', '"nbformat": 9')),
            [],
            "n.ipynb is not a valid notebook",
        ),
        (
            "scale unknown",
            grid("grid: {steps: [1]}\nscales: {demo: {}}"),
            ["--scale", "demos"],
            "Did you mean 'demo'",
        ),
        ("parameter of the grid", None, ["-p", "steps", "3"], "-p steps.*g.yaml"),
        ("parameter misspelt", None, ["-p", "rat", "3"], "Did you mean 'rate'"),
        ("no workers", None, ["--workers", "0"], "--workers 0"),
        ("workers as a word", None, ["--workers", "all"], "--workers"),
        ("rows that are not there", None, ["--rows", "R99"], "--rows: 'R99'"),
        ("out of a run", write("out/config.json", "{}"), [], "--out: out"),
        (
            "out with a broken record",
            write("out/parameters.json", "{"),
            [],
            "out/parameters.json is not valid JSON",
        ),
        ("out with files of others", write("out/thesis.tex", ""), [], "thesis.tex"),
    ]
] + [
    ("grid absent", None, ["sweep", "absent.yaml"], "absent.yaml does not exist"),
    (
        "grid unknown",
        None,
        ["sweep", "lotos_ablation"],
        "unknown grid 'lotos_ablation'. Did you mean 'lotus_ablation'",
    ),
    (
        "sweep with an option misspelt",
        None,
        ["sweep", "g.yaml", "--scal", "demo"],
        "unknown option '--scal'. Did you mean '--scale'",
    ),
    ("grid is a folder", None, ["sweep", "thesis"], "thesis is a folder"),
    (
        "grid is a pipe",
        fifo("p.yaml"),
        ["sweep", "p.yaml"],
        "p.yaml is neither a file nor a folder, but a pipe",
    ),
    (
        "grid is a device",
        None,
        ["sweep", "/dev/zero"],
        "/dev/zero is neither a file nor a folder, but a pipe",
    ),
    ("sweep into a file", None, ["sweep", "g.yaml", "--out", "file"], "--out.*file"),
]

# ---------------------------------------------------------------- ukd report

REPORT = [
    (name, prepare_it, ["report", *more], says)
    for name, prepare_it, more, says in [
        ("run absent", None, ["absent"], "absent"),
        ("run without scores", None, ["thesis"], "thesis/metrics.csv"),
        ("run of a file without scores", None, ["file"], "file is not a file of rows"),
        ("run is a pipe", fifo("p"), ["p"], "p is neither a file nor a folder, but a pipe"),
        ("one run of two is absent", None, ["run", "absent"], "absent"),
        ("scores are a folder", folder("r/metrics.csv"), ["r"], "r/metrics.csv is a folder"),
        (
            "scores are a dangling link",
            lambda place: ((place / "r").mkdir(), (place / "r/metrics.csv").symlink_to("gone")),
            ["r"],
            "r/metrics.csv is a link to gone, which is not there",
        ),
        ("scores are empty", scores(""), ["run"], "run/metrics.csv.*no column 'arm'"),
        ("scores are a header", scores(HEADER), ["run"], "run: its table of scores is empty"),
        (
            "one table of two is a header",
            scores(HEADER),
            ["same/run", "run"],
            "run: its table of scores is empty",
        ),
        ("scores of another program", scores("epoch,loss\n1,2\n"), ["run"], "no column 'arm'"),
        (
            "scores are binary",
            scores(b"\x89PNG\r\n\x1a\n\x00\xff"),
            ["run"],
            "run/metrics.csv is not UTF-8",
        ),
        (
            "scores in UTF-16",
            scores(SCORES.encode("utf-16")),
            ["run"],
            "run/metrics.csv is not UTF-8",
        ),
        ("scores with a zero byte", scores(SCORES + "\0\n"), ["run"], "run/metrics.csv"),
        ("scores cut in a line", scores(SCORES[:-8]), ["run"], "run/metrics.csv, line 7 is cut"),
        (
            "scores cut in a number",
            scores(SCORES[:-2]),
            ["run"],
            "run/metrics.csv: its last line has no end",
        ),
        ("scores cut in quotes", scores(SCORES + 'kl,1,c,"x'), ["run"], "run/metrics.csv"),
        (
            "scores with a word",
            scores(HEADER + "alone,0,c,x,x,good\n"),
            ["run"],
            "run/metrics.csv, line 2",
        ),
        (
            "scores with a comma in a number",
            scores(HEADER + "alone,0,c,x,x,0,5\n"),
            ["run"],
            "line 2 is cut or too long",
        ),
        ("seed is a word", scores(HEADER + "alone,first,c,x,x,0.5\n"), ["run"], "line 2"),
        ("seed is broken", scores(HEADER + "alone,1.5,c,x,x,0.5\n"), ["run"], "line 2"),
        (
            "column twice",
            scores("arm,seed,case,group,dsc,dsc\nalone,0,x,x,0.5,0.6\n"),
            ["run"],
            "two columns have the same name",
        ),
        (
            "two scores of one case",
            scores(SCORES + "kl,0,c,x,x,0.9\n"),
            ["run"],
            "run: arm 'kl' has two scores of case 'x' with seed 0",
        ),
        ("reference unknown", None, ["run", "--reference", "alon"], "Did you mean 'alone'"),
        ("metric unknown", None, ["run", "--metrics", "dcs"], "--metrics.*Did you mean 'dsc'"),
        ("metric is text", None, ["run", "--metrics", "arm"], "--metrics.*'arm'"),
        ("no metric", None, ["run", "--metrics"], "--metrics"),
        ("no run", None, [], "RUN"),
        (
            "broken config.json",
            write("run/config.json", "{"),
            ["run"],
            "run/config.json is not valid JSON",
        ),
        (
            "broken parameters.json",
            write("run/parameters.json", "{"),
            ["run"],
            "run/parameters.json is not valid JSON",
        ),
        (
            "broken split",
            lambda place: (
                write("run/config.json", '{"study": {}, "arms": {}, "seeds": []}')(place),
                write("run/splits/student-0.json", "")(place),
            ),
            ["run"],
            "run/splits/student-0.json is not valid JSON",
        ),
    ]
] + [
    ("no command", None, [], "run . sweep . predict . report|required"),
    ("unknown command", None, ["train"], "unknown command 'train'"),
    ("command misspelt", None, ["rnu", "lotus"], "unknown command 'rnu'. Did you mean 'run'"),
    ("command without a name", None, [""], "unknown command ''"),
    (
        "option of nothing",
        None,
        ["--verson"],
        "unknown option '--verson'. Did you mean '--version'",
    ),
]


# ---------------------------------------------------------------- ukd predict


@functools.cache
def stock():
    "Two students, images and volumes, made once: name -> bytes."
    r = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as home, seeded(0, "bad inputs"):
        home = Path(home)
        flat = make_network("unet", dict(in_channels=1, classes=1, width=2))
        deep = make_network("light_unet", dict(width=2, levels=2))
        Student(flat, Recipe(channels=1, in_channels=1, patch=64)).save(home / "flat")
        Student(deep, Recipe(in_channels=1, dims=3, patch=512)).save(home / "deep")
        for name in ("im/a.png", "im/b.png", "wide.tif"):
            write_image(home / name, Image(r.integers(0, 256, (1, 32, 40), np.uint8)))
        for name in ("v.zarr", "v.tif", "v.nii.gz"):
            write_image(home / name, Image(r.integers(1, 256, (1, 32, 30, 33), np.uint8)))
        return {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()}


def ready(*more):
    "Prepare: students, images and volumes, then what is wrong."

    def make(place):
        for name, content in stock().items():
            write(name, content)(place)
        for m in more:
            m(place)

    return make


def copy(name, to, change=bytes):
    "Prepare: a changed copy of a file, or of a folder as it is."

    def make(place):
        if (place / name).is_dir():
            shutil.copytree(place / name, place / to, dirs_exist_ok=True)
        else:
            write(to, change((place / name).read_bytes()))(place)

    return make


def half(content):
    return content[: len(content) // 2]


def alter(name, change):
    "Prepare: a JSON file with a change."

    def make(place):
        data = json.loads((place / name).read_text())
        change(data)
        (place / name).write_text(json.dumps(data))

    return make


def reshape(data):
    data["shape"] = [10**9, 10**9, 10**9]


def widen(data):
    data["recipe"]["network_config"]["width"] = 10**12


def digestless(data):
    data.pop("recipe_digest")


IN = ["flat", "im"]
OUT = ["flat", "im", "out"]
PREDICT = [
    (name, ready(*more), ["predict", *arguments], says)
    for name, more, arguments, says in [
        # the output is, holds or lies in what must stay
        (
            "output is the input",
            [],
            ["flat", "im/a.png", "im/a.png", "--overwrite"],
            "im/a.png is the input itself",
        ),
        (
            "output is the input on another way",
            [],
            ["flat", "im/a.png", "flat/../im/./a.png", "--overwrite"],
            "is the input itself",
        ),
        (
            "output is a link to the input",
            [link("l.png", "im/a.png")],
            ["flat", "im/a.png", "l.png", "--overwrite"],
            "l.png is the input itself",
        ),
        (
            "output is another name of the input",
            [lambda place: os.link(place / "im/a.png", place / "h.png")],
            ["flat", "im/a.png", "h.png", "--overwrite"],
            "h.png is the input itself",
        ),
        (
            "output folder is the input",
            [],
            ["flat", "im", "im/", "--overwrite"],
            "im/a.png is the input itself",
        ),
        (
            "output folder is a link to the input",
            [link("l", "im")],
            ["flat", "im", "l", "--overwrite"],
            "l/a.png is the input itself",
        ),
        (
            "output folder in the input",
            [],
            ["flat", "im", "im/out"],
            "im/out/a.png lies in im, the input",
        ),
        (
            "output folder is the student",
            [],
            ["flat", "im", "flat"],
            "lies in flat, the student's folder",
        ),
        (
            "output is the student's weights",
            [],
            ["flat", "im/a.png", "flat/weights.safetensors"],
            "flat/weights.safetensors",
        ),
        (
            "instances replace the input",
            [copy("im/a.png", "a_instances.png")],
            ["flat", "a_instances.png", "a.png", "--instances", "--overwrite"],
            "a_instances.png is the input itself",
        ),
        (
            "blocks: output is the input",
            [],
            ["deep", "v.zarr", "v.zarr/", "--overwrite"],
            "v.zarr is the input itself",
        ),
        (
            "blocks: output lies in the input",
            [],
            ["deep", "v.zarr", "v.zarr/labels.zarr"],
            "lies in v.zarr, the input",
        ),
        (
            "blocks: output holds the input",
            [copy("v.zarr", "e.zarr/raw.zarr")],
            ["deep", "e.zarr/raw.zarr", "e.zarr", "--overwrite"],
            "holds e.zarr/raw.zarr",
        ),
        (
            "blocks: the work folder holds the input",
            [copy("v.zarr", "o.zarr.part/v.zarr")],
            ["deep", "o.zarr.part/v.zarr", "o.zarr"],
            "o.zarr.part holds",
        ),
        (
            "blocks: the work folder is somebody's",
            [write("o.zarr.part/thesis.tex", "years")],
            ["deep", "v.zarr", "o.zarr"],
            "o.zarr.part is there.*thesis.tex",
        ),
        # the output is there, or cannot be
        (
            "output is there",
            [],
            ["flat", "im/a.png", "im/b.png"],
            "im/b.png is there already.*--overwrite",
        ),
        (
            "one output of two is there",
            [copy("im/a.png", "out/b.png")],
            OUT,
            "out/b.png is there already",
        ),
        (
            "an instance map is there",
            [copy("im/a.png", "out/b_instances.png")],
            [*OUT, "--instances"],
            "out/b_instances.png is there already",
        ),
        (
            "output is a dangling link",
            [link("l.png", "gone")],
            ["flat", "im/a.png", "l.png"],
            "l.png is there already",
        ),
        (
            "output is a pipe",
            [fifo("p.png")],
            ["flat", "im/a.png", "p.png", "--overwrite"],
            "p.png is there and is not a file",
        ),
        (
            "output is a Zarr with more in it",
            [copy("v.zarr", "o.zarr"), write("o.zarr/raw/c", "")],
            ["deep", "v.zarr", "o.zarr", "--overwrite"],
            "o.zarr is there and is no label map",
        ),
        (
            "output below a file",
            [],
            [*IN, "file/out"],
            "cannot write into file/out.*file is not a folder",
        ),
        ("output folder is a file", [], [*IN, "file"], "output file: it is a file"),
        ("output of an unset variable", [], [*IN, ""], "output '' is no path"),
        ("input of an unset variable", [], ["flat", "", "out"], "input '' is no path"),
        ("student of an unset variable", [], ["", "im", "out"], "student '' is no path"),
        ("output where nothing can be", [], [*IN, "/proc/out"], "cannot write into /proc/out"),
        ("output is a device", [], [*IN, "/dev/null/x"], "/dev/null is not a folder"),
        (
            "output with a long name",
            [],
            ["flat", "im/a.png", "x" * 300 + ".png"],
            "name is too long",
        ),
        ("output in a loop of links", [link("l", "l")], [*IN, "l/out"], "cannot write into l/out"),
        ("output as JPEG", [], ["flat", "im/a.png", "o.jpg"], "JPEG changes pixel values"),
        (
            "output as GIF",
            [],
            ["flat", "im/a.png", "o.gif"],
            "o.gif: the ending is not one we write",
        ),
        ("a volume as PNG", [], ["flat", "v.nii.gz", "o.png"], "PNG holds no volumes"),
        (
            "two images of one output",
            [copy("im/a.png", "im/a.jpg")],
            OUT,
            "would both be written to out/a.png",
        ),
        (
            "two names of one file on many disks",
            [copy("im/a.png", "im/A.PNG")],
            OUT,
            "the same name on many disks",
        ),
        (
            "an image named as an instance map",
            [copy("im/a.png", "im/a_instances.png")],
            [*OUT, "--instances"],
            "would both be written to out/a_instances.png",
        ),
        # the input
        ("input absent", [], ["flat", "gone.png", "out"], "gone.png does not exist"),
        (
            "input is a dangling link",
            [link("l.png", "gone")],
            ["flat", "l.png", "out"],
            "l.png is a link to gone",
        ),
        (
            "input is a pipe",
            [fifo("p.png")],
            ["flat", "p.png", "out"],
            "p.png is neither a file nor a folder",
        ),
        ("input is a device", [], ["flat", "/dev/zero", "out"], "/dev/zero is neither"),
        ("input is an empty folder", [folder("e")], ["flat", "e", "out"], "e holds no images"),
        ("input without images", [], ["flat", "thesis", "out"], "thesis holds no images"),
        ("input of no format", [], ["flat", "file", "out"], "file: the ending"),
        (
            "input is a left-over part",
            [copy("im/a.png", ".ukd.part.a.png")],
            ["flat", ".ukd.part.a.png", "out"],
            "what a killed command left",
        ),
        ("input is text", [write("t.png", "hello")], ["flat", "t.png", "out"], "t.png"),
        ("input is nothing", [write("t.tif", "")], ["flat", "t.tif", "out"], "t.tif"),
        ("input is cut: PNG", [copy("im/a.png", "t.png", half)], ["flat", "t.png", "out"], "t.png"),
        (
            "input is cut: TIFF",
            [copy("v.tif", "t.tif", half)],
            ["flat", "t.tif", "new/deep/o.tif"],
            "t.tif",
        ),
        (
            "input is cut: NIfTI",
            [copy("v.nii.gz", "t.nii.gz", half)],
            ["flat", "t.nii.gz", "out"],
            "t.nii.gz",
        ),
        (
            "a header that promises the world",
            [alter("v.zarr/0/zarr.json", reshape)],
            ["flat", "v.zarr", "o.tif"],
            "v.zarr: its chunk 0/c/.* is not there",
        ),
        ("volumes only", [], ["deep", "im/a.png", "out"], "im/a.png is 2-D"),
        # device, options
        (
            "device unknown",
            [],
            [*OUT, "--device", "potato"],
            "--device potato.*This machine has cpu",
        ),
        ("device without a name", [], [*OUT, "--device", ""], "--device"),
        ("device without numbers", [], [*OUT, "--device", "meta"], "--device meta"),
        ("precision unknown", [], [*OUT, "--precision", "fp8"], "'fp8'"),
        (
            "instances in blocks",
            [],
            ["deep", "v.zarr", "o.zarr", "--instances", "--tile", "16"],
            "--instances needs the whole volume",
        ),
        (
            "blocks of a 2-D student",
            [],
            ["flat", "v.zarr", "o.zarr", "--blocks"],
            "this student is 2-D",
        ),
        (
            "blocks of a picture",
            [],
            ["deep", "im/a.png", "o.zarr", "--blocks"],
            "im/a.png: blocks are read from",
        ),
        (
            "blocks of a folder",
            [],
            ["deep", "im", "o.zarr", "--blocks"],
            "im: blocks are read from",
        ),
        (
            "blocks to NIfTI",
            [],
            ["deep", "v.zarr", "o.nii.gz", "--blocks"],
            "blocks are written to .zarr or .tif",
        ),
        (
            "blocks to a TIFF by processes",
            [],
            ["deep", "v.zarr", "o.tif", "--workers", "1"],
            "several processes",
        ),
        (
            "blocks of a cut TIFF",
            [copy("v.tif", "t.tif", half)],
            ["deep", "t.tif", "o.tif", "--blocks"],
            "t.tif",
        ),
        (
            "blocks of a damaged chunk",
            [write("v.zarr/0/c/0/0/0", "x")],
            ["deep", "v.zarr", "o.zarr"],
            "v.zarr: its chunk 0/c/0/0/0 is damaged",
        ),
        (
            "blocks of a lost chunk",
            [lambda place: (place / "v.zarr/0/c/0/0/0").unlink()],
            ["deep", "v.zarr", "o.zarr", "--blocks"],
            "v.zarr.*0/c/0/0/0 is not there",
        ),
        ("tile of nothing", [], ["deep", "v.zarr", "o.zarr", "--tile", ""], "tile=''"),
        (
            "tile off the stride",
            [],
            ["deep", "v.zarr", "o.zarr", "--tile", "7"],
            "tile=7: give multiples",
        ),
        ("halo of a word", [], ["deep", "v.zarr", "o.zarr", "--halo", "x"], "halo='x'"),
        (
            "memory of nothing",
            [],
            ["deep", "v.zarr", "o.zarr", "--memory", "0"],
            "does not fit into the memory given",
        ),
        ("memory of a word", [], ["deep", "v.zarr", "o.zarr", "--memory", "much"], "memory='much'"),
        ("empty is no number", [], ["deep", "v.zarr", "o.zarr", "--empty", "nan"], "empty=nan"),
        ("workers below none", [], ["deep", "v.zarr", "o.zarr", "--workers", "-1"], "workers=-1"),
        (
            "spacing of nothing",
            [],
            ["deep", "v.zarr", "o.zarr", "--spacing", "0,1,1"],
            "spacing='0,1,1'",
        ),
        (
            "scheduler without a port",
            [],
            ["deep", "v.zarr", "o.zarr", "--scheduler", "potato"],
            "--scheduler potato",
        ),
        # the student
        ("student absent", [], ["gone", "im", "out"], "gone/weights.safetensors does not exist"),
        ("student is a file", [], ["file", "im", "out"], "file/weights.safetensors does not exist"),
        (
            "student without weights",
            [lambda place: (place / "flat/weights.safetensors").unlink()],
            OUT,
            "flat/weights.safetensors does not exist",
        ),
        (
            "student with cut weights",
            [copy("flat/weights.safetensors", "flat/weights.safetensors", half)],
            OUT,
            "flat/weights.safetensors cannot be read",
        ),
        (
            "student with other weights",
            [copy("deep/weights.safetensors", "flat/weights.safetensors")],
            OUT,
            "flat/weights.safetensors does not fit",
        ),
        (
            "student with a broken config",
            [write("flat/config.json", "{")],
            OUT,
            "flat/config.json is not valid JSON",
        ),
        (
            "student of another program",
            [write("flat/config.json", '{"model_type": "bert"}')],
            OUT,
            "flat/config.json is not the config",
        ),
        (
            "student changed by hand",
            [alter("flat/config.json", widen)],
            OUT,
            "flat/config.json: the recipe was changed",
        ),
        (
            "student that takes all memory",
            [alter("flat/config.json", widen), alter("flat/config.json", digestless)],
            OUT,
            "flat/config.json: no network here has an argument above",
        ),
    ]
]


@pytest.mark.parametrize(
    "bad", ["text.png", "cut.tif", "gone.png", "pipe.nii.gz", "huge.zarr", "odd\n%d{}.png"]
)
def test_a_bad_image_is_named_and_the_others_are_finished(bad, tmp_path):
    ready()(tmp_path)
    path = tmp_path / "im" / bad
    if bad == "gone.png":
        path.symlink_to("nowhere")
    elif bad == "pipe.nii.gz":
        os.mkfifo(path)
    elif bad == "cut.tif":
        path.write_bytes(half(stock()["v.tif"]))
    elif bad == "huge.zarr":
        shutil.copytree(tmp_path / "v.zarr", path)
        alter(f"im/{bad}/0/zarr.json", reshape)(tmp_path)
    else:
        path.write_text("hello")
    before = tree(tmp_path)
    status, error = call(["predict", *OUT], tmp_path)
    assert (
        status == 1
        and "2 of 3 images were segmented; 1 were not" in error
        and "Traceback" not in error
    )
    assert bad.replace("\n", " ") in error
    now = tree(tmp_path)
    assert {k: now[k] for k in before} == before and now.keys() - before.keys() == {
        "out",
        "out/a.png",
        "out/b.png",
    }


def load(name, *more, **options):
    return list(more), lambda: Student.load(name, **options)


def array(shape, kind=np.uint8):
    return lambda: Student.load("flat").predict(np.zeros(shape, kind))


def path(*arguments, **options):
    return lambda: predict_path(*arguments, bars=False, **options)


def volume(*arguments, **options):
    return lambda: predict_volume(*arguments, **options)


def nameless():
    "A student whose network has no config."
    Student(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), Recipe(channels=1, in_channels=1)).save(
        "new"
    )


API = [
    ("load: absent", *load("gone"), "gone/weights.safetensors does not exist"),
    ("load: no path", *load(""), "student '' is no path"),
    ("load: zero byte", *load("fl\0at"), "is no path"),
    ("load: no such device", *load("flat", device="tpu"), "--device tpu"),
    ("load: no such precision", *load("flat", precision="int4"), "'int4'"),
    (
        "load: weights are a pipe",
        *load(
            "flat",
            lambda place: (
                (place / "flat/weights.safetensors").unlink(),
                os.mkfifo(place / "flat/weights.safetensors"),
            ),
        ),
        "flat/weights.safetensors",
    ),
    (
        "load: weights are a pickle",
        *load("flat", write("flat/weights.safetensors", pickle.dumps({"a": 1}))),
        "flat/weights.safetensors cannot be read",
    ),
    (
        "load: config is a bomb of brackets",
        *load("flat", write("flat/config.json", "[" * 100000)),
        "flat/config.json is not valid JSON",
    ),
    (
        "load: recipe of odd types",
        *load(
            "flat",
            alter(
                "flat/config.json",
                lambda data: (digestless(data), data["recipe"].update(zoom="big")),
            ),
        ),
        "flat/config.json: zoom='big'",
    ),
    (
        "load: network unknown",
        *load(
            "flat",
            alter(
                "flat/config.json",
                lambda data: (digestless(data), data["recipe"].update(network="os.system")),
            ),
        ),
        "unknown network 'os.system'",
    ),
    ("predict: five axes", [], array((1, 1, 4, 32, 32)), "is not an image"),
    ("predict: one axis", [], array(7), "is not an image"),
    ("predict: too small", [], array((2, 3)), "needs at least"),
    (
        "predict: NaN",
        [],
        lambda: Student.load("flat").predict(np.full((32, 32), np.nan, np.float32)),
        "NaN",
    ),
    (
        "predict: text",
        [],
        lambda: Student.load("flat").predict(np.full((32, 32), "a")),
        "type <U1 and shape \\(32, 32\\) is not an image",
    ),
    ("predict: complex numbers", [], array((32, 32), complex), "type complex128"),
    ("predict: nothing", [], array((0, 32)), "shape \\(0, 32\\) is not an image"),
    (
        "predict: rows of unequal length",
        [],
        lambda: Student.load("flat").predict([[1, 2], [3]]),
        "no array of numbers",
    ),
    ("path: no input", [], path("flat", None, "out"), "input None is no path"),
    ("path: a list of inputs", [], path("flat", ["im/a.png"], "out"), "is no path"),
    ("path: no student", [], path(None, "im", "out"), "student None is no path"),
    ("volume: zero byte in the student", [], volume("de\0ep", "v.zarr", "o.zarr"), "is no path"),
    ("volume: empty is text", [], volume("deep", "v.zarr", "o.zarr", empty="x"), "empty='x'"),
    (
        "volume: workers are text",
        [],
        volume("deep", "v.zarr", "o.zarr", workers="2"),
        "workers='2'",
    ),
    (
        "volume: memory is a list",
        [],
        volume("deep", "v.zarr", "o.zarr", memory=[1]),
        "memory=\\[1\\]",
    ),
    ("save: nowhere", [], lambda: Student.load("flat").save(""), "folder '' is no path"),
    ("path: zero byte in the output", [], path("flat", "im", "o\0ut"), "is no path"),
    ("path: output is there", [], path("flat", "im/a.png", "im/b.png"), "overwrite=True"),
    (
        "path: a student in memory, no such device",
        [],
        lambda: predict_path(Student.load("flat"), "im", "out", device="cuda:99"),
        "--device cuda:99",
    ),
    ("volume: zero byte in the output", [], volume("deep", "v.zarr", "o\0.zarr"), "is no path"),
    (
        "volume: a student in memory for a cluster",
        [],
        lambda: predict_volume(Student.load("deep"), "v.zarr", "o.zarr", workers=1),
        "not a Student in memory",
    ),
    ("volume: tile of odd type", [], volume("deep", "v.zarr", "o.zarr", tile={"z": 1}), "tile="),
    ("volume: tile of half voxels", [], volume("deep", "v.zarr", "o.zarr", tile=16.5), "tile=16.5"),
    (
        "volume: absent unknown",
        [],
        volume("deep", "v.zarr", "o.zarr", absent="zero"),
        "unknown absent 'zero'",
    ),
    (
        "volume: output is there",
        [copy("v.tif", "o.tif")],
        volume("deep", "v.zarr", "o.tif"),
        "o.tif is there already",
    ),
    ("save: into a file", [], lambda: Student.load("flat").save("file"), "file"),
    (
        "save: where nothing can be",
        [],
        lambda: Student.load("flat").save("/proc/student"),
        "/proc/student",
    ),
    ("save: network without a config", [], nameless, "no `config`|not registered"),
]


@pytest.mark.parametrize("more, action, says", [pytest.param(m, a, s, id=n) for n, m, a, s in API])
def test_bad_input_of_a_function(more, action, says, tmp_path, monkeypatch):
    prepare(tmp_path)
    ready(*more)(tmp_path)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as e:
        action()
    check_message(str(e.value), says)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, make, says",
    [
        pytest.param(a, r, s, id=f"{kind}: {n}")
        for kind, rows in dict(
            run=RUN, check=CHECK, sweep=SWEEP, report=REPORT, predict=PREDICT
        ).items()
        for n, r, a, s in rows
    ],
)
def test_bad_input(arguments, make, says, tmp_path):
    prepare(tmp_path)
    if make:
        make(tmp_path)
    check_bad(arguments, says, tmp_path)


def test_the_rows_are_many_and_differ():
    rows = [*RUN, *CHECK, *FAULTY, *SWEEP, *REPORT, *PREDICT]
    assert len(rows) > 300 and len({(n, tuple(a)) for n, _, a, _ in rows}) == len(rows)


@pytest.mark.parametrize(
    "arguments",
    [given("stepz", "3"), ["sweep", "absent.yaml"], ["report", "absent"]],
    ids=["run", "sweep", "report"],
)
def test_a_process_of_its_own_says_the_same(arguments, tmp_path):
    "From a shell with an ASCII locale, UTF-8 mode off and every warning an error of encoding."
    prepare(tmp_path)
    before = tree(tmp_path)
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", START, *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2 and done.stdout == "" and tree(tmp_path) == before
    check_message(done.stderr, "stepz|absent")


def test_a_mistake_of_ours_shows_its_traceback(monkeypatch, tmp_path):
    """Only what a user can mend becomes a sentence; and with UKD_DEBUG that too shows where it
    arose."""

    def broken(args):
        raise KeyError("ours")

    monkeypatch.setitem(cli.COMMANDS, "report", broken)
    with pytest.raises(KeyError):
        cli.main(["report", "x"])

    def refused(args):
        raise PermissionError(13, "Permission denied", "secret.csv")

    monkeypatch.setitem(cli.COMMANDS, "report", refused)
    status, error = call(["report", "x"], tmp_path)
    assert status == 2 and error == "ukd report: secret.csv: Permission denied.\n"
    monkeypatch.setenv("UKD_DEBUG", "1")
    with pytest.raises(PermissionError):
        cli.main(["report", "x"])
