"""Names, tables and contents: what a table says for certain is read, everything else is refused by
name."""

import hashlib
import json
import os
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from unpaired_kd.core import InputError
from unpaired_kd.data.formats import files
from unpaired_kd.data.formats.files import (
    _locate_cache,
    find_file,
    find_table,
    hash_array,
    hash_files,
    name_stem,
    normalise_name,
    read_plane_size,
    read_table,
    simplify_name,
)

NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
WANT = [{"id": "1", "group": "Müller"}, {"id": "2", "group": "b"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def table(tmp_path, raw):
    (tmp_path / "t.csv").write_bytes(raw)
    return tmp_path / "t.csv"


@pytest.mark.parametrize(
    "raw",
    [
        "id,group\n1,Müller\n2,b\n".encode(),
        "id,group\r\n1,Müller\r\n2,b\r\n".encode("utf-8-sig"),
        "id\tgroup\r\n1\tMüller\r\n2\tb\r\n".encode("utf-16"),  # Excel: "Unicode text"
        b"\xfe\xff" + "id;group\n1;Müller\n2;b\n".encode("utf-16-be"),
        "id;group;\n1;Müller;\n2;b;\n;;\n".encode(),  # Excel in Europe, an empty row
        "sep=;\r\nid;group\r\n1;Müller\r\n2;b\r\n".encode(),
        "ID, Group \n 1 ,\u00a0Müller\n2,b\n".encode(),  # spaces, one that does not break
        f"id,group\n1,{NFD}\n2,b\n".encode(),  # from a Mac
        "id,group\n1,Müller\n2,b,,\n\n".encode(),  # empty cells too many
        "group,id\nMüller,1\nb,2".encode(),  # no newline at the end
    ],
    ids=range(10),
)
def test_what_is_certain_is_read(tmp_path, raw):
    rows = read_table(table(tmp_path, raw), ("id", "group"))
    assert [{k: v for k, v in r.items() if k} for r in rows] == WANT
    assert rows[0].line < rows[1].line


@pytest.mark.parametrize(
    "raw,words",
    [
        ("id,group\n1,Müller\n".encode("cp1252"), ["not UTF-8", "0xfc", "CSV UTF-8"]),
        ("id,group\n1,a\n".encode("utf-16-le"), ["zero bytes", "CSV UTF-8"]),  # no mark
        ("id,group\n1,ü".encode("utf-16")[:-1], ["utf-16", "damaged"]),
        (b"id,group\n1,a\n2\n", ["line 3", "1 cells", "header 2"]),
        (b"id,group\n1,a,b\n", ["line 2", "3 cells", "header 2"]),
        (b'id,group\n1,"a\n2,b\n', ["quotation mark"]),
        (b"id,group,id\n1,a,2\n", ["two columns", "'id'"]),
        (b"name,group\n1,a\n", ["column 'id' is missing", "name, group"]),
        (b"id,group\n", ["no rows"]),
        (b"", ["no rows"]),
    ],
    ids=range(10),
)
def test_what_is_uncertain_is_refused_by_name(tmp_path, raw, words):
    with pytest.raises(InputError) as e:
        read_table(table(tmp_path, raw), ("id", "group"))
    for w in ["t.csv", *words]:
        assert w in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


def test_a_quoted_newline_is_part_of_its_cell(tmp_path):
    rows = read_table(table(tmp_path, b'id,group\n"1\n2","a, b"\n3,c\n'), ("id",))
    assert [(r["id"], r["group"], r.line) for r in rows] == [("1\n2", "a, b", 3), ("3", "c", 4)]


@pytest.mark.parametrize("before", [b"", b"sep=;\n", b"SEP=;\r\n", b"sep=;\r"], ids=range(4))
def test_lines_are_counted_as_an_editor_does(tmp_path, before):
    path = table(tmp_path, before + b"id;group\n1;a\n\n2;b\n")
    first = 2 + bool(before)
    assert [r.line for r in read_table(path, ("id",))] == [first, first + 2]
    with pytest.raises(InputError, match=f"line {first + 1}: the row has 1 cells"):
        read_table(table(tmp_path, before + b"id;group\n1;a\n2\n"), ("id",))


def test_a_table_in_capitals_is_refused(tmp_path):
    assert find_table(tmp_path, "groups.csv") is None
    (tmp_path / "groups.csv").symlink_to("gone.csv")
    (tmp_path / "my groups.csv").touch()
    assert find_table(tmp_path, "groups.csv") == tmp_path / "groups.csv"
    for name in ("Groups.csv", "GROUPS.CSV"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"{name} is not read.*small letters, groups.csv"):
            find_table(tmp_path, "groups.csv")
        (tmp_path / name).unlink()


@pytest.mark.parametrize("made", ["fifo", "folder", "link", "nothing"])
def test_a_table_that_is_no_file(tmp_path, made):
    path = tmp_path / "t.csv"
    if made == "fifo":
        os.mkfifo(path)
    if made == "folder":
        path.mkdir()
    if made == "link":
        path.symlink_to(tmp_path / "gone.csv")
    with pytest.raises(InputError, match="t.csv"):
        read_table(path, ("id",))


def test_names(tmp_path):
    assert (
        NFC != NFD
        and normalise_name(NFC) == normalise_name(NFD) == normalise_name(f" {NFD}\u00a0") == NFC
    )
    assert normalise_name("a") != normalise_name("A")
    assert (
        len({simplify_name(n) for n in ("P-01", "p1", "p_001", " P 1")}) == 1
        and len({simplify_name(n) for n in ("p1", "p10", "p", "q1", "1p")}) == 5
    )
    assert name_stem(Path(f"x/{NFD} .nii.gz")) == NFC and name_stem(Path("a.b.png")) == "a.b"
    with pytest.raises(InputError, match="not UTF-8"):
        name_stem(Path(os.fsdecode(b"\xfc.png")))
    for name in ("a.ome.tif", "a.ome.tiff", "a.OME.TIF", "a.ome.zarr", "a.ome.png", "a.ome"):
        assert name_stem(Path(name)) == "a"
    for name, want in ((".ome.tif", ".ome"), ("rome.tif", "rome"), ("a.ome.b.tif", "a.ome.b")):
        assert name_stem(Path(name)) == want


# the file that a table means


@pytest.fixture
def place(tmp_path):
    for name in ("in/a.png", f"in/{NFD}.png", "in/b c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "name,found",
    [
        ("in/a.png", "in/a.png"),
        (r"in\a.png", "in/a.png"),
        ("./in//a.png", "in/a.png"),
        ("in/../in/a.png", "in/a.png"),
        (f"in/{NFC}.png", f"in/{NFD}.png"),
        (f"in\\{NFC}.png", f"in/{NFD}.png"),
        (f"in/{NFD}.png", f"in/{NFD}.png"),
        ("in/b c.png ", "in/b c.png"),
    ],
)
def test_a_listed_file_is_found(place, name, found):
    assert find_file(place, name, "t.csv") == place / found
    assert find_file(place, str(place / "in/a.png"), "t.csv") == place / "in/a.png"


@pytest.mark.parametrize(
    "name,words",
    [
        ("../x.png", "leads out"),
        ("in/../../x.png", "leads out"),
        ("/etc/hostname", "leads out"),
        (r"C:\data\a.png", "leads out"),
        (r"..\x.png", "leads out"),
        (".", "leads out"),
        ("in/z.png", "does not exist"),
        ("in/A.png", "does not exist"),
    ],
)
def test_a_listed_file_that_is_not_there(place, name, words):
    with pytest.raises(InputError, match=words) as e:
        find_file(place, name, "t.csv, line 7")
    assert "t.csv, line 7" in str(e.value)


@pytest.mark.parametrize(
    "name,meant",
    [
        ("in/A.png", "in/a.png"),
        ("In/a.PNG", "in/a.png"),
        ("in/b_c.png", "in/b c.png"),
        ("in/b.png", None),
        ("in/aa.png", None),
    ],
)
def test_the_file_that_was_meant_is_offered(place, name, meant):
    with pytest.raises(InputError) as e:
        find_file(place, name, "t.csv, line 7")
    assert str(e.value).endswith(
        f"{name} does not exist." + (f" Did you mean {meant}?" if meant else "")
    )


def test_links_fifos_and_two_forms_of_one_name(place):
    (place / "in/gone.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match="is a link to nowhere.png"):
        find_file(place, "in/gone.png", "t.csv")
    os.mkfifo(place / "in/pipe.png")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        find_file(place, "in/pipe.png", "t.csv")
    (place / f"in/{NFC}.png").touch()
    assert (
        find_file(place, f"in/{NFC}.png", "t.csv") == place / f"in/{NFC}.png"
    )  # the very name comes first
    with pytest.raises(InputError, match="any of 2 files"):
        find_file(place, f"in/{NFC}.png ", "t.csv")


# contents


def old(path):
    "Pretend that the file was written an hour ago (its entry still changed now)."
    os.utime(path, (time.time() - 3600,) * 2)


def test_a_hash_is_remembered_and_never_trusted_too_long(tmp_path, monkeypatch):
    a = tmp_path / "d/a.bin"
    a.parent.mkdir()
    a.write_bytes(b"one")
    want = {str(a): hashlib.sha256(b"one").hexdigest()}
    assert (
        hash_files([a]) == want and not _locate_cache(a.parent).exists()
    )  # too fresh to be remembered
    monkeypatch.setattr(files, "_FRESH", -60.0)
    assert hash_files([a]) == want and _locate_cache(a.parent).exists()
    reads = []
    true = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda p: reads.append(p) or true(p))
    assert hash_files([a]) == want and not reads  # not read again
    s = a.stat()
    a.write_bytes(b"two")  # same size
    os.utime(a, ns=(s.st_atime_ns, s.st_mtime_ns))  # and the old time
    assert hash_files([a]) == {str(a): hashlib.sha256(b"two").hexdigest()} and len(reads) == 1
    other = tmp_path / "d/new"
    other.write_bytes(b"one")
    os.utime(other, ns=(s.st_atime_ns, s.st_mtime_ns))
    os.replace(other, a)  # another inode
    assert hash_files([a]) == want


@pytest.mark.parametrize(
    "broken", [b"", b"[]", b"{", b'{"a.bin": 3}', b'{"a.bin": ["x"]}', b"\xff"]
)
def test_a_damaged_memory_is_no_memory(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(files, "_FRESH", -60.0)
    a = tmp_path / "a.bin"
    a.write_bytes(b"one")
    hash_files([a])
    _locate_cache(tmp_path).write_bytes(broken)
    assert hash_files([a]) == {str(a): hashlib.sha256(b"one").hexdigest()}
    assert (
        json.loads(_locate_cache(tmp_path).read_text())["a.bin"][1]
        == hashlib.sha256(b"one").hexdigest()
    )


@pytest.mark.parametrize("cache", ["file", "relative", "none"])
def test_no_place_for_a_memory(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(files, "_FRESH", -60.0)
    if cache == "file":
        (tmp_path / "occupied").write_text("x")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    if cache == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    if cache == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda p: p)  # no HOME, no such user
        assert _locate_cache(tmp_path) is None
    a = tmp_path / "a.bin"
    a.write_bytes(b"one")
    for _ in range(2):
        assert hash_files([a]) == {str(a): hashlib.sha256(b"one").hexdigest()}


def test_folders_are_their_files(tmp_path):
    z = tmp_path / "v.zarr"
    for name in ("0/c/0", "0/zarr.json", ".zattrs"):
        (z / name).parent.mkdir(parents=True, exist_ok=True)
        (z / name).write_text(name)
    first = hash_files([z])
    (z / "0/c/0").write_text("0/c/1")
    second = hash_files([z])
    (z / "0/c/0").rename(z / "0/c/1")
    third = hash_files([z])
    assert len({h[str(z)] for h in (first, second, third)}) == 3
    with pytest.raises(InputError, match="gone.png cannot be read"):
        hash_files([tmp_path / "gone.png"])


def test_arrays():
    a = np.arange(12, dtype=np.uint8).reshape(3, 4)
    same = [a.copy(), np.asfortranarray(a), np.arange(24, dtype=np.uint8)[::2].reshape(3, 4) // 2]
    assert {hash_array(b) for b in same} == {hash_array(a)}
    others = [a.T, a.astype(np.int8), a.reshape(4, 3), a + 1, a[:0]]
    assert len({hash_array(b) for b in [a, *others]}) == 6


def test_sizes_of_headers(tmp_path):
    from PIL import Image

    from unpaired_kd.data.formats.images import Image as Ours
    from unpaired_kd.data.formats.writing import write_image

    for ending in (".png", ".jpg", ".tif", ".nii.gz", ".zarr"):
        shape = (1, 12, 34) if ending in (".png", ".jpg") else (1, 5, 12, 34)
        write_image(tmp_path / f"a{ending}", Ours(np.zeros(shape, np.uint8)))
        assert read_plane_size(tmp_path / f"a{ending}") == (12, 34), ending
    Image.new("RGB", (34, 12)).save(tmp_path / "c.png")
    assert read_plane_size(tmp_path / "c.png") == (12, 34)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name in ("bad.png", "gone.tif", "gone"):
        assert read_plane_size(tmp_path / name) is None
