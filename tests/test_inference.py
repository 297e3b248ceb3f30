"""Students: saved, loaded, alone, and in the face of bad files."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from unpaired_kd.core import InputError, seeded
from unpaired_kd.data.formats.images import Image, read_image, read_label
from unpaired_kd.data.formats.writing import write_image
from unpaired_kd.inference.files import _name_output, predict_path
from unpaired_kd.inference.student import (
    FILES,
    Recipe,
    Student,
    _check_fit,
    channels_first,
    logits,
    pad_to,
    probabilities,
)
from unpaired_kd.networks.registry import build

R = np.random.default_rng(0)


def student(
    channels=1, in_channels=3, classes=("background", "thing"), dims=2, logits_out=None, **kw
):
    "A small student with random weights and settled BatchNorm."
    with seeded(0, "student"):
        net = build(
            "unet",
            dict(
                in_channels=in_channels,
                classes=logits_out or (1 if len(classes) == 2 else len(classes)),
                width=4,
                dims=dims,
            ),
        )
        net(torch.rand(2, in_channels, *(32,) * dims))
    return Student(
        net.eval(),
        Recipe(
            channels=channels,
            in_channels=in_channels,
            classes=classes,
            dims=dims,
            **{"patch": 64, **kw},
        ),
    )


@pytest.fixture
def folder(tmp_path):
    return student().save(tmp_path / "student")


def noise(*shape):
    return R.integers(0, 256, shape, np.uint8)


# ---- recipe


def test_recipe_is_plain_data():
    r = student(intensity=(-160, 240), classes=("a", "b", "c"), zoom=0.5).recipe
    assert (
        Recipe.load(json.loads(json.dumps(asdict(r)))) == r
        and isinstance(r.intensity, tuple)
        and isinstance(r.classes, tuple)
    )


@pytest.mark.parametrize(
    "bad",
    [
        dict(channels=2),
        dict(channels=3, in_channels=1),
        dict(classes=("one",)),
        dict(classes=("a", "a")),
        dict(zoom=0),
        dict(dims=4),
        dict(patch=0),
        dict(overlap=1),
        dict(overlap=-0.1),
        dict(min_size=-1),
    ],
)
def test_recipe_refuses(bad):
    with pytest.raises(
        InputError, match=next(k for k in bad if k != "channels" or "in_channels" not in bad)
    ):
        Recipe(**bad)


@pytest.mark.parametrize(
    "change",
    [
        dict(patch=40),
        dict(classes=("a", "b", "c")),
        dict(in_channels=1),
        dict(dims=3),
        dict(network_config={"in_channels": 3, "classes": 1, "width": 8}),
    ],
)
def test_recipe_must_fit_the_network(change):
    s = student()
    with pytest.raises(InputError):
        Student(s.network, replace(s.recipe, **{"network_config": {}, **change}))


# ---- predict


def test_strides_may_differ_by_axis():
    "Each side is padded for its own stride, and cut back."

    class Net(torch.nn.Module):
        strides = (2, 8, 4)
        stride = 8

        def forward(self, x):
            assert all(n % k == 0 for n, k in zip(x.shape[2:], self.strides))
            self.seen = tuple(x.shape[2:])
            return x

    net = Net()
    x = torch.rand(1, 1, 5, 9, 3)
    assert torch.equal(logits(net, x, 64), x) and net.seen == (6, 16, 4)
    assert torch.equal(pad_to(x, (2, 8, 4)), pad_to(pad_to(x, (2, 8, 4)), (2, 8, 4)))
    with pytest.raises(InputError, match="multiple of 8"):
        _check_fit(net, Recipe(dims=3, patch=12))


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (64, 64), (65, 90), (100, 130)])
@pytest.mark.parametrize("zoom", [1.0, 0.5, 1.7])
def test_native_size(size, zoom):
    s = student(zoom=zoom)
    x = noise(*size)
    if min(s.prepare(noise(64, 64)).shape[-2:]) * min(size) / 64 < 15.5:
        with pytest.raises(InputError, match="at least 16"):
            s.predict(x)
        return
    y = s.predict(x)
    p = s.probabilities(x)
    assert (
        y.shape == size
        and p.shape == (2, *size)
        and p.dtype == np.float32
        and np.issubdtype(y.dtype, np.integer)
    )
    assert np.array_equal(y, p.argmax(0)) and np.allclose(p.sum(0), 1, atol=1e-5)


def test_one_piece_is_the_network_itself():
    s = student(patch=128)
    x = noise(48, 80)
    with torch.inference_mode():
        z = s.network(torch.from_numpy(x / np.float32(255))[None, None].expand(1, 3, 48, 80))
    assert np.allclose(s.probabilities(x)[1], z.sigmoid()[0, 0].numpy(), atol=1e-5)


def test_binary_with_two_logits_and_organs():
    for names, out in ((("background", "thing"), 2), (("background", "a", "b", "c"), 4)):
        s = student(classes=names, logits_out=out)
        p = s.probabilities(noise(32, 48))
        assert p.shape == (out, 32, 48) and np.allclose(p.sum(0), 1, atol=1e-5)
    assert probabilities(torch.tensor([[[1e4]], [[-1e4]]])[:, None]).isfinite().all()


def test_layouts_are_one_image():
    s = student()
    c = student(channels=3)
    grey = noise(32, 48)
    rgb = noise(32, 48, 3)
    same = [
        s.predict(a)
        for a in (grey, grey[None], grey[..., None], torch.from_numpy(grey), Image(grey[None]))
    ]
    assert all(np.array_equal(same[0], y) for y in same)
    assert np.array_equal(c.predict(rgb), c.predict(np.moveaxis(rgb, -1, 0)))
    assert np.array_equal(c.predict(np.stack([grey] * 3)), c.predict(grey))  # grey is replicated
    with pytest.raises(InputError, match="grey"):
        s.predict(rgb)
    for bad in (np.zeros(5), np.zeros((2, 2, 2, 2, 2))):
        with pytest.raises(InputError, match="not an image"):
            channels_first(bad)


@pytest.mark.parametrize("channels", [1, 3])
def test_volume_is_its_slices(channels):
    s = student(channels=channels, zoom=0.7)
    v = noise(channels, 7, 50, 60)
    want = np.stack([s.predict(v[:, k]) for k in range(7)])
    assert (
        np.array_equal(s.predict(v), want)
        and s.probabilities(v).shape == (2, 7, 50, 60)
        and np.array_equal(s.probabilities(v).argmax(0), want)
    )
    assert s.prepare(v).shape == (7, 3, 35, 42)


def test_3d_network():
    s = student(dims=3, in_channels=1, patch=32)
    v = noise(20, 40, 48)
    y = s.predict(v)
    assert (
        y.shape == v.shape
        and np.array_equal(y, s.probabilities(v).argmax(0))
        and s.prepare(v).shape == (1, 1, 20, 40, 48)
    )
    with pytest.raises(InputError, match="2-D"):
        s.predict(v[0])
    thin = v[:10]
    far = np.concatenate([thin, thin[8:2:-1]])  # 16 slices, mirrored
    assert (s.predict(thin) == s.predict(far)[:10]).all()
    assert s.predict(v[:1]).shape == (1, *v.shape[1:])  # one slice: repeated


def test_too_small_names_file_and_size(tmp_path):
    Pillow.fromarray(noise(40, 15)).save(tmp_path / "thin.png")
    with pytest.raises(InputError, match="(?s)thin.png.*40 x 15.*at least 16"):
        student().predict(tmp_path / "thin.png")
    with pytest.raises(InputError, match="15 x 15 pixels for the network .zoom 0.5"):
        student(zoom=0.5).predict(noise(30, 30))


def test_faults_in_arrays_name_the_image(tmp_path):
    with pytest.raises(InputError, match=r"\(1, 32, 32\).*NaN"):
        student().predict(np.full((32, 32), np.nan, np.float32))
    with pytest.raises(InputError, match="percentile"):
        student().predict(np.full((32, 32), -1000, np.int16))
    write_image(tmp_path / "ct.tif", Image(np.full((1, 32, 32), -1000, np.int16)))
    with pytest.raises(InputError, match="(?s)ct.tif.*window"):
        student().predict(tmp_path / "ct.tif")


def test_tiles_equal_monai_and_hide_at_full_overlap():
    "A network with no context: tiles must not change anything."

    class Point(torch.nn.Module):
        stride = 16

        def forward(self, x):
            return x[:, :1] * 3 - 1

    x = torch.rand(2, 1, 100, 70)
    assert torch.allclose(logits(Point(), x, 32), Point()(x), atol=1e-5)
    s = student(patch=32, overlap=0.5)
    y = noise(90, 70)
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        z = sliding_window_inference(
            torch.nn.functional.pad(s.prepare(y), (0, 10, 0, 6), mode="reflect"),
            (32, 32),
            4,
            s.network,
            overlap=0.5,
            mode="gaussian",
        )[..., :90, :70]
    assert np.allclose(s.probabilities(y)[1], z.sigmoid()[0, 0].numpy(), atol=1e-5)


def test_the_network_is_left_as_it_was():
    s = student()
    s.network.train()
    s.network.conv3.eval()
    before = {k: v.clone() for k, v in s.network.state_dict().items()}
    s.predict(noise(48, 48))
    assert s.network.training and not s.network.conv3.training and s.network.conv1.training
    assert all(torch.equal(before[k], v) for k, v in s.network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in s.network.parameters())


def test_repeatable_and_close_in_bf16():
    s = student()
    x = noise(80, 96)
    a = s.probabilities(x)
    b = Student(s.network, s.recipe, precision="bf16").probabilities(x)
    assert (
        np.array_equal(a, s.probabilities(x))
        and b.dtype == np.float32
        and 0 < np.abs(a - b).max() < 0.1
    )
    with pytest.raises(InputError, match="precision"):
        Student(s.network, s.recipe, precision="fp8").predict(x)


# ---- save and load


def test_round_trip(folder):
    s = student()
    x = noise(40, 50)
    back = Student.load(folder, device="cpu")
    assert (
        np.array_equal(back.predict(x), s.predict(x))
        and back.recipe == s.recipe
        and not back.network.training
    )
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    a = {f: (folder / f).read_bytes() for f in FILES}
    back.save(folder)
    assert a == {f: (folder / f).read_bytes() for f in FILES}  # same student, same bytes


def test_card(tmp_path):
    text = (
        student().save(tmp_path / "s", card={"data": "phantoms", "scores": {"dsc": 0.9}})
        / "README.md"
    ).read_text()
    assert "phantoms" in text and "  - **dsc**: 0.9" in text and "background" in text


def swap(folder, **recipe):
    "Change the recipe in config.json."
    c = json.loads((folder / "config.json").read_text())
    c["recipe"].update(recipe)
    c.pop("recipe_digest", None)  # the change is meant
    (folder / "config.json").write_text(json.dumps(c))


def test_another_architecture(folder, tmp_path):
    swap(folder, network_config=dict(in_channels=3, classes=1, width=8))
    with pytest.raises(
        InputError, match="(?s)weights.safetensors does not fit.*another architecture"
    ):
        Student.load(folder)
    swap(folder, network_config=dict(in_channels=3, classes=1, breadth=8))
    with pytest.raises(InputError, match="(?s)config.json.*breadth"):
        Student.load(folder)
    swap(folder, network="vnet")
    with pytest.raises(InputError, match="(?s)config.json.*unknown network 'vnet'"):
        Student.load(folder)


def test_missing_and_extra_keys(folder):
    from safetensors.torch import load_file, save_file

    path = folder / FILES[0]
    state = load_file(path)
    first = next(iter(state))
    for change, say in (
        (lambda d: d.pop(first), f"{first} is missing"),
        (lambda d: d.update(more=torch.zeros(1)), "more is not known"),
    ):
        d = dict(state)
        change(d)
        save_file(d, path)
        with pytest.raises(InputError, match=f"(?s)weights.safetensors.*{say}"):
            Student.load(folder)
    save_file({k: v + 1 for k, v in state.items()}, path)
    with pytest.raises(InputError, match="SHA-256"):
        Student.load(folder)


def test_corrupt_files(folder):
    data = (folder / FILES[0]).read_bytes()
    for cut in (0, 7, 100, len(data) // 2, len(data) - 1):
        (folder / FILES[0]).write_bytes(data[:cut])
        with pytest.raises(InputError, match="weights.safetensors"):
            Student.load(folder)
    (folder / FILES[0]).write_bytes(data)
    text = (folder / "config.json").read_text()
    for bad in (
        "",
        text[:50],
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 2, "recipe": {}}',
        text.replace('"zoom"', '"zom"'),
        text.replace('"zoom": 1.0', '"zoom": 2.0'),
        text.replace('"zoom": 1.0', '"zoom": "a"'),
    ):
        (folder / "config.json").write_text(bad)
        with pytest.raises(InputError, match="config.json"):
            Student.load(folder)
    for name in (FILES[0], "config.json"):
        (folder / "config.json").write_text(text)
        (folder / name).rename(folder / "away")
        with pytest.raises(InputError, match=name):
            Student.load(folder)
        (folder / "away").rename(folder / name)
    Student.load(folder)
    with pytest.raises(InputError, match="nowhere"):
        Student.load(folder / "nowhere")


def test_save_into_a_bad_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        student().save(tmp_path / "file" / "student")


# ---- alone in its process

ALONE = """
import sys
from unpaired_kd.inference.files import predict_path
from unpaired_kd.inference.student import Student
import numpy as np
assert "monai" not in sys.modules
s = Student.load(sys.argv[1], device="cpu")
s.predict(np.zeros((40, 40), np.uint8))
assert "monai" not in sys.modules                      # one tile needs no MONAI
predict_path(s, sys.argv[2], sys.argv[3])              # many tiles do
assert "monai" in sys.modules
house = ["methods", "distillation", "training"]
others = ["papermill", "IPython", "ipykernel", "jupyter", "nbformat", "nbclient", "nbdev"]
unwanted = (*(f"unpaired_kd.{part}" for part in house), *others)
bad = [m for m in sys.modules if m.startswith(unwanted)]
assert not bad, bad
"""


@pytest.mark.slow
def test_alone(folder, tmp_path):
    Pillow.fromarray(noise(100, 90)).save(tmp_path / "big.png")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder, tmp_path / "big.png", tmp_path / "out.png"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(
        read_label(tmp_path / "out.png").array, student().predict(tmp_path / "big.png")
    )


# ---- files and folders


def test_one_file_to_file_and_to_folder(folder, tmp_path):
    Pillow.fromarray(noise(40, 50)).save(tmp_path / "x.jpg")
    want = student().predict(tmp_path / "x.jpg")
    assert predict_path(folder, tmp_path / "x.jpg", tmp_path / "y.tif") == [tmp_path / "y.tif"]
    assert predict_path(folder, tmp_path / "x.jpg", tmp_path / "new") == [
        tmp_path / "new" / "x.png"
    ]
    for f in (tmp_path / "y.tif", tmp_path / "new" / "x.png"):
        assert np.array_equal(read_label(f).array, want)


def test_nifti_volume_keeps_its_grid(folder, tmp_path):
    affine = np.array([[-1.0, 0, 0, 9], [0, 2, 0, 8], [0, 0, 5, 7], [0, 0, 0, 1]])
    write_image(tmp_path / "scan.nii.gz", Image(noise(1, 5, 40, 32), (5.0, 2.0, 1.0), affine))
    predict_path(folder, str(tmp_path / "scan.nii.gz"), str(tmp_path / "out"))
    back = read_label(tmp_path / "out" / "scan.nii.gz")
    assert (
        back.array.shape == (5, 40, 32)
        and back.spacing == (5.0, 2.0, 1.0)
        and np.allclose(back.affine, affine)
    )
    assert np.array_equal(back.array, student().predict(tmp_path / "scan.nii.gz"))


def test_folder_names_what_it_left_out_and_finishes_the_rest(folder, tmp_path, capsys):
    src = tmp_path / "in"
    src.mkdir()
    for n in ("a.png", "b.png", "z.png"):
        Pillow.fromarray(noise(40, 50)).save(src / n)
    write_image(src / "v.nii.gz", Image(noise(1, 3, 40, 32)))
    (src / "list.csv").write_text("")
    assert [p.name for p in predict_path(folder, src, tmp_path / "out")] == [
        "a.png",
        "b.png",
        "v.nii.gz",
        "z.png",
    ]
    said = capsys.readouterr().out
    assert "list.csv" in said and "4 label maps" in said
    (src / "b.png").write_bytes((src / "b.png").read_bytes()[:100])
    Pillow.fromarray(noise(40, 50, 3)).save(src / "c.png")
    with pytest.raises(InputError, match=r"(?s)3 of 5 images.*b\.png.*c\.png is RGB"):
        predict_path(folder, src, tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["a.png", "v.nii.gz", "z.png"]


def test_dicom_series_becomes_nifti(folder, tmp_path):
    pytest.importorskip("pydicom")
    from test_images import dicom_series

    s = student(intensity=(-1000, 1000))
    src = dicom_series(tmp_path / "series", R.integers(-1000, 1000, (3, 32, 32)).astype(np.int16))
    assert predict_path(s, src, tmp_path / "out") == [tmp_path / "out" / "series.nii.gz"]
    assert np.allclose(
        read_label(tmp_path / "out" / "series.nii.gz").affine, read_image(src).affine
    )


def test_bad_places(folder, tmp_path):
    src = tmp_path / "in"
    src.mkdir()
    with pytest.raises(InputError, match="no images"):
        predict_path(folder, src, tmp_path / "out")
    Pillow.fromarray(noise(40, 50)).save(src / "a.png")
    with pytest.raises(InputError, match="input itself"):
        predict_path(folder, src, src)
    with pytest.raises(InputError, match="does not exist"):
        predict_path(folder, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="ending"):
        predict_path(folder, src / "a.png", tmp_path / "a.bmp")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(InputError, match="file"):
            predict_path(folder, src, target)
    Pillow.fromarray(noise(40, 50)).save(src / "a.jpg")
    with pytest.raises(InputError, match=r"both be written"):
        predict_path(folder, src, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="config.json|weights"):
        predict_path(tmp_path, src, tmp_path / "out")


def test_output_names():
    from pathlib import Path

    for a, b in {
        "x.jpg": "x.png",
        "x.PNG": "x.PNG",
        "x.y.nii.gz": "x.y.nii.gz",
        "x.dcm": "x.nii.gz",
        "series": "series.nii.gz",
        "x.tif": "x.tif",
        "x.zarr": "x.zarr",
    }.items():
        assert _name_output(Path(a)) in (b, b.lower())


# ---- the intensity standard of MR


def mr(seed, gain=1.0):
    "A volume (4,32,48) float32 of one scanner."
    r = np.random.default_rng(seed)
    return (
        gain * (r.gamma(2.0, 60.0, (4, 32, 48)) + 200 * (np.indices((4, 32, 48))[2] > 20))
    ).astype(np.float32)


@pytest.fixture(scope="module")
def common():
    from unpaired_kd.data.intensity import HistogramStandard

    return HistogramStandard.fit([mr(k, gain) for k, gain in enumerate((0.7, 1.0, 1.6))])


def test_the_standard_travels_with_the_student(tmp_path, common):
    s = student(standard=common.to_dict())
    again = Student.load(s.save(tmp_path / "mr"), device="cpu")
    assert (
        again.recipe == s.recipe
        and Recipe.load(json.loads(json.dumps(asdict(s.recipe)))) == s.recipe
    )
    v = mr(9)
    assert np.array_equal(again.predict(v), s.predict(v)) and np.array_equal(
        s.prepare(v)[:, 0].numpy(), common.apply(v)
    )
    card = (tmp_path / "mr" / "README.md").read_text()
    assert "12 landmarks fitted on 3 volumes" in card and "whole raw volume" in card


def test_the_network_sees_the_same_under_another_gain(common):
    s = student(standard=common.to_dict(), invert=True)
    v = mr(9)
    assert (s.prepare(v) - s.prepare(2.5 * v)).abs().max() < 1e-4
    assert np.allclose(s.prepare(v)[:, 0].numpy(), 1 - common.apply(v), atol=1e-6)
    bare = student(intensity=(0, 800))
    assert (bare.prepare(v) - bare.prepare(2.5 * v)).abs().max() > 0.1  # the test can tell


def test_the_entry_of_a_prepared_data_set_is_a_standard(tmp_path, common):
    from unpaired_kd.core import read_json
    from unpaired_kd.data.sets.clinical import Scan, prepare_clinical

    for k in range(3):
        write_image(tmp_path / "raw" / f"{k}.nii.gz", Image(mr(k)[None], (3.0, 1.0, 1.0)))
    scans = [Scan(f"p{k}", f"p{k}", tmp_path / "raw" / f"{k}.nii.gz") for k in range(3)]
    made = prepare_clinical(
        {"mr": scans}, tmp_path / "prepared", {"mr": common}, {"mr": ("background", "thing")}
    )
    raw, unit = (
        student(standard=rule).prepare(p)
        for rule, p in (
            (read_json(made / "preparation.json")["rules"]["mr"], scans[0].image),
            (None, made / "mr" / "p0.nii.gz"),
        )
    )
    assert (raw - unit).abs().max() < 1e-5  # raw at use is prepared in training, but for 16 bits


def test_without_a_standard_nothing_changes(tmp_path):
    s = student()
    config = s.save(tmp_path / "old") / "config.json"
    saved = json.loads(config.read_text())
    x = noise(4, 32, 48)
    saved.pop("recipe_digest")  # as it was saved before there were such entries
    assert (
        saved["recipe"].pop("standard") is None
        and "standard" not in (tmp_path / "old" / "README.md").read_text()
    )
    config.write_text(json.dumps(saved))
    old = Student.load(tmp_path / "old", device="cpu")
    assert (
        old.recipe == s.recipe
        and old.recipe.standard is None
        and np.array_equal(old.prepare(x)[:, 0].numpy(), x / np.float32(255))
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(intensity="percentile"), "intensity='dtype'"),
        (dict(intensity=(0, 1)), "intensity='dtype'"),
        (dict(channels=3), "grey"),
        (dict(standard="histogram"), "to_dict"),
        (dict(standard={}), "standard"),
        (dict(standard=dict(kind="z")), "kind"),
        (
            dict(standard=dict(kind="window_hu", low=-1000.0, high=500.0)),
            r"intensity=\(-1000.0, 500.0\)",
        ),
        (
            dict(standard=dict(landmarks=[3, 2, 1], clip=1.0, percentiles=[1, 99])),
            "recipe: histogram standard",
        ),
        (
            dict(standard=dict(landmarks=[1, 2, 3], clip=1.0, percentiles=[1, 99], volume=3)),
            "volume",
        ),
    ],
)
def test_a_standard_is_checked(common, change, message):
    with pytest.raises(InputError, match=message):
        Recipe(**{"standard": common.to_dict(), **change})


@pytest.mark.parametrize(
    "image, message",
    [
        (mr(0)[0], "single slice"),
        (mr(0)[:1][None], "single slice"),
        (np.zeros((4, 32, 48), np.float32), "constant"),
        (np.where(mr(0) > 300, np.nan, mr(0)), "NaN"),
    ],
)
def test_a_standard_needs_whole_sound_volumes(common, image, message):
    with pytest.raises(InputError, match=message):
        student(standard=common.to_dict()).predict(image)


def test_a_scan_that_cannot_be_standardised_is_named(tmp_path, common):
    write_image(
        tmp_path / "flat.nii.gz", Image(np.full((1, 4, 32, 48), 7, np.float32), (3.0, 1.0, 1.0))
    )
    with pytest.raises(InputError, match="flat.nii.gz"):
        student(standard=common.to_dict()).predict(tmp_path / "flat.nii.gz")
