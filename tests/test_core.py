"""Files survive kills and power cuts, locks end with their process, and text is UTF-8."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from unpaired_kd import core
from unpaired_kd.core import (
    OLD_PREFIX,
    PART_PREFIX,
    InputError,
    atomic,
    atomic_folder,
    clear_parts,
    lock_folder,
    read_csv,
    read_json,
    read_text,
    write_csv,
    write_json,
)


def killed_at(step, code, folder):
    """Run `code` in a process that is killed when it calls `step` of `os`; the exit status is
    returned."""
    program = f"""
        import os, signal
        from pathlib import Path
        from unpaired_kd.core import *
        folder = Path({str(folder)!r})
        calls = 0
        name, at = {step!r}
        true = getattr(os, name)
        def stop(*a, **k):
            global calls
            calls += 1
            if calls == at: os.kill(os.getpid(), signal.SIGKILL)
            return true(*a, **k)
        setattr(os, name, stop)
    """
    text = textwrap.dedent(program) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


WRITE = """
with atomic(folder / "a.json") as t:
    t.write_text("new")
    assert t.suffix == ".json"
"""


@pytest.mark.parametrize("step", [("chmod", 1), ("fsync", 1), ("replace", 1), ("fsync", 2)])
def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path, step):
    (tmp_path / "a.json").write_text("old")
    assert killed_at(step, WRITE, tmp_path).returncode == -9
    assert (tmp_path / "a.json").read_text() == ("new" if step == ("fsync", 2) else "old")
    with atomic(tmp_path / "a.json") as t:  # the next write of the same file takes the part away
        assert names(tmp_path) == sorted([t.name, "a.json"])
        t.write_text("newest")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "newest"


def test_the_bytes_are_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    told = []

    def fsync(handle, true=os.fsync):
        told.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        true(handle)

    def replace(a, b, true=os.replace):
        told.append("rename")
        true(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic(tmp_path / "a") as t:
        t.write_text("x")
    assert told == ["file", "rename", "folder"]


FOLDER = """
with atomic_folder(folder / "v.zarr") as t:
    (t / "block").write_text("new")
"""


@pytest.mark.parametrize(
    "step", [("fsync", 1), ("replace", 1), ("replace", 2), ("fsync", 3), ("rmdir", 1)]
)
def test_a_killed_folder_is_the_old_one_or_the_new_one_after_the_next_start(tmp_path, step):
    with atomic_folder(tmp_path / "v.zarr") as t:
        (t / "block").write_text("old")
    assert killed_at(step, FOLDER, tmp_path).returncode == -9
    clear_parts(tmp_path)
    assert names(tmp_path) == ["v.zarr"]
    arrived = step in (("fsync", 3), ("rmdir", 1))
    assert (tmp_path / "v.zarr/block").read_text() == ("new" if arrived else "old")


def test_clearing_spares_writers_at_work_and_everybody_elses_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".download.part").write_text("not ours")
    (tmp_path / (PART_PREFIX + "dead.pt")).write_text("left by a kill")
    (tmp_path / "sub" / (PART_PREFIX + "dead.pt")).write_text("left by a kill")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    (tmp_path / "sub" / "link").symlink_to(outside)
    (tmp_path / (PART_PREFIX + "link")).symlink_to(outside / "keep")
    with atomic(tmp_path / "live.pt") as t:
        clear_parts(tmp_path)
        assert t.exists() and not (tmp_path / (PART_PREFIX + "dead.pt")).exists()
        assert (tmp_path / "sub" / (PART_PREFIX + "dead.pt")).exists()
        clear_parts(tmp_path, deep=True)
        assert t.exists() and not (tmp_path / "sub" / (PART_PREFIX + "dead.pt")).exists()
        t.write_text("alive")
    assert (outside / "keep").read_text() == "x" and (tmp_path / ".download.part").exists()


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"  # the outer block ends last
    assert names(tmp_path) == ["a"]


def test_many_threads_leave_one_whole_file(tmp_path):
    def work(k):
        for _ in range(20):
            with atomic(tmp_path / "a") as t:
                t.write_text(str(k) * 10000)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    text = (tmp_path / "a").read_text()
    assert text == text[0] * 10000 and names(tmp_path) == ["a"]


def test_a_writer_that_puts_nothing_into_the_part_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(InputError, match="cannot write .*a.txt: its writer put nothing into"):
        with atomic(tmp_path / "a.txt"):
            (tmp_path / "other.txt").write_text("new")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt", "other.txt"]


def test_long_names_and_strange_ones(tmp_path):
    for name in ("x" * 250 + ".csv", "a b{}%'\".json", "ü.txt"):
        with atomic(tmp_path / name) as t:
            assert t.suffix == Path(name).suffix
            t.write_text("x")
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    "make", [lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "x").write_text(""))]
)
def test_a_file_never_replaces_a_folder(tmp_path, make):
    make(tmp_path / "a")
    with pytest.raises(InputError, match="cannot write .*/a: Is a directory"):
        with atomic(tmp_path / "a") as t:
            t.write_text("x")
    assert (tmp_path / "a").is_dir() and names(tmp_path) == ["a"]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot write .*/a.json: No space left on device"):
        write_json(tmp_path / "a.json", {})
    assert names(tmp_path) == []


def test_a_lock_ends_with_its_process(tmp_path):
    code = f"""
import sys, time
from unpaired_kd.core import lock_folder
with lock_folder({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"another run is at work in {tmp_path}"):
        with lock_folder(tmp_path, "another run"):
            pass
    other.kill()
    other.wait()
    with lock_folder(tmp_path):
        pass


def test_text_is_utf8_whatever_the_language_of_the_system(tmp_path):
    code = f"""
from unpaired_kd.core import write_csv, write_json
write_json({str(tmp_path / "a.json")!r}, "M\\u00fcller \\u00b5")
write_csv({str(tmp_path / "a.csv")!r}, [dict(case="M\\u00fcller", dsc=.5)])
"""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], check=True, env=env)
    assert (tmp_path / "a.json").read_bytes() == '"Müller µ"\n'.encode()
    assert read_csv(tmp_path / "a.csv") == [dict(case="Müller", dsc=0.5)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is a folder; a text file is needed here"),
        (lambda p: os.mkfifo(p), "is neither a file nor a folder, but a pipe"),
        (
            lambda p: p.write_bytes(b"a\xfcb"),
            r"is not UTF-8 text \(byte 1 is 0xfc\)\. Save it as UTF-8",
        ),
        (lambda p: p.write_bytes("a".encode("utf-16")), r"is not UTF-8 text \(byte 0 is 0xff\)"),
        (
            lambda p: p.symlink_to(p.with_name("nowhere")),
            "is a link to .*nowhere, which is not there",
        ),
    ],
    ids=["missing", "folder", "fifo", "latin-1", "utf-16", "dangling"],
)
@pytest.mark.parametrize("read", [read_text, read_json, read_csv])
def test_what_is_no_text_is_refused_by_name(tmp_path, make, message, read):
    path = tmp_path / "note.txt"
    make(path)
    with pytest.raises(InputError, match=f"{path} {message}"):
        read(path)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_name_that_is_no_unicode_survives(tmp_path):
    name = os.fsdecode(b"M\xfcller.png")
    write_json(tmp_path / "a.json", {"image": name})
    assert (tmp_path / "a.json").read_bytes().isascii() and read_json(tmp_path / "a.json") == {
        "image": name
    }


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", "[" * 100000], ids=["empty", "cut", "quotes", "deep"]
)
def test_broken_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="a.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_tables_come_back_as_they_were(tmp_path):
    rows = [
        dict(case="a, b", arm='say "x"', dsc=0.1 + 0.2, seed=0, note="two\nlines"),
        dict(case="c", arm="", dsc=float("inf"), seed=-1, hd95=1e-300),
    ]
    write_csv(tmp_path / "a.csv", rows)
    rows[1].pop("arm")
    assert read_csv(tmp_path / "a.csv") == rows


def test_names_that_look_like_numbers_stay_names(tmp_path):
    rows = [dict(case=c, dsc=1) for c in ("007", "7", "1e3")]
    write_csv(tmp_path / "a.csv", rows)
    assert [r["case"] for r in read_csv(tmp_path / "a.csv")] == ["007", "7", "1e3"]
    write_csv(tmp_path / "b.csv", [dict(case="1_000"), dict(case="٣"), dict(case=" 5")])
    assert [r["case"] for r in read_csv(tmp_path / "b.csv")] == ["1_000", "٣", " 5"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n3\n", "row 3 has 1 fields, its header 2"),
        ("a,b\n1,2,3\n", "row 2 has 3 fields, its header 2"),
        ('a,b\n"1,2\n', "is not a table of comma-separated values"),
    ],
)
def test_cut_tables_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=f"a.csv.*{message}"):
        read_csv(tmp_path / "a.csv")


def test_an_empty_table_has_no_rows(tmp_path):
    write_csv(tmp_path / "a.csv", [])
    assert read_csv(tmp_path / "a.csv") == []


# ---- nothing is replaced that appears meanwhile


def came_late(tmp_path, name, write, overwrite):
    "Write a file or folder while somebody else writes one of the same name."
    with (atomic_folder if name == "folder" else atomic)(tmp_path / name, overwrite) as t:
        write(t, "mine")
        write(tmp_path / name, "theirs")


def write_file(path, text):
    path.write_text(text)


def write_folder(path, text):
    path.mkdir(exist_ok=True)
    (path / "block").write_text(text)


def said_in(path):
    return (path / "block" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("name, write", [("file", write_file), ("folder", write_folder)])
def test_what_came_meanwhile_stays_unless_it_may_be_replaced(
    tmp_path, monkeypatch, name, write, links
):
    def refuse(*a):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(core.os, "link", refuse)
    with pytest.raises(InputError, match=f"{name} is there already"):
        came_late(tmp_path, name, write, False)
    assert said_in(tmp_path / name) == "theirs" and [p.name for p in tmp_path.iterdir()] == [name]
    came_late(tmp_path, name, write, True)
    assert said_in(tmp_path / name) == "mine" and [p.name for p in tmp_path.iterdir()] == [name]
    with (atomic_folder if name == "folder" else atomic)(tmp_path / "new", False) as t:
        write(t, "first")
    assert said_in(tmp_path / "new") == "first" and sorted(p.name for p in tmp_path.iterdir()) == [
        name,
        "new",
    ]


def test_a_dangling_link_is_there(tmp_path):
    os.symlink("gone", tmp_path / "file")
    with pytest.raises(InputError, match="is there already"), atomic(tmp_path / "file", False) as t:
        t.write_text("mine")
    assert os.readlink(tmp_path / "file") == "gone" and not (tmp_path / "gone").exists()


@pytest.mark.skipif(os.name != "posix", reason="rights of groups")
def test_a_folder_keeps_to_its_group(tmp_path):
    (tmp_path / "group").mkdir()
    os.chmod(tmp_path / "group", 0o2755)
    with atomic_folder(tmp_path / "group" / "v.zarr") as t:
        (t / "0").mkdir()
    assert [
        oct((tmp_path / "group" / p).stat().st_mode & 0o7777) for p in ("v.zarr", "v.zarr/0")
    ] == ["0o2755", "0o2755"]
    with atomic_folder(tmp_path / "plain") as t:
        pass
    assert oct((tmp_path / "plain").stat().st_mode & 0o7777) == "0o755"


def test_a_folder_that_may_only_be_put_into(tmp_path, monkeypatch):
    "Rights 0333: such a folder cannot be opened, and what was written into it is there."
    opened = os.open

    def refuse(path, *a, **k):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *a, **k)

    monkeypatch.setattr(core.os, "open", refuse)
    monkeypatch.setattr(core.os, "access", lambda path, mode: not os.path.isdir(path))
    with atomic(tmp_path / "file") as t:
        t.write_text("mine")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_a_replaced_folder_leaves_is_named(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "v.zarr") as t:
        write_folder(t, "old")
    monkeypatch.setattr(core, "_remove", lambda path: None)
    with (
        pytest.warns(UserWarning, match=f"{OLD_PREFIX}v.zarr, which .*v.zarr has replaced"),
        atomic_folder(tmp_path / "v.zarr") as t,
    ):
        write_folder(t, "new")
    assert said_in(tmp_path / "v.zarr") == "new"


@pytest.mark.parametrize(
    "make",
    [lambda p: os.symlink("mine.txt", p), lambda p: os.symlink("gone", p), os.mkfifo, os.mkdir],
    ids=["link", "dangling link", "pipe", "folder"],
)
def test_a_lock_is_a_plain_file(tmp_path, make):
    (tmp_path / "mine.txt").write_text("x")
    make(tmp_path / ".ukd.lock")
    before = sorted(p.name for p in tmp_path.iterdir())
    with (
        pytest.raises(InputError, match="ukd.lock is there and is no file of ours"),
        lock_folder(tmp_path),
    ):
        pass
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == before
        and (tmp_path / "mine.txt").read_text() == "x"
    )
