"""UMMKD: what is shared, what is not, and what is exported."""

import copy

import pytest
import torch
from test_lotus import Two, nets, run

from unpaired_kd.core import InputError
from unpaired_kd.methods.ummkd import UMMKD, OtherNorms, UmmkdOptions, rarity_weighted_cross_entropy
from unpaired_kd.networks.registry import load_weights, make_network
from unpaired_kd.networks.unet import UNet
from unpaired_kd.training.checkpoints import load_checkpoint


@pytest.mark.parametrize("dims,classes", [(2, 2), (2, 4), (3, 3)])
def test_trains_in_two_and_three_dimensions(tmp_path, dims, classes):
    student, _ = nets(dims, classes)
    r = run(tmp_path, UMMKD(student), Two(dims, classes), epochs=3)
    assert [h["stage"] for h in r.history] == ["joint"] * 3 and r.history[-1]["seg"] < r.history[0][
        "seg"
    ]


def test_kernels_are_shared_and_norms_are_not(tmp_path):
    student, _ = nets()
    m = UMMKD(student)
    norms = {n for n, x in student.named_modules() if isinstance(x, torch.nn.BatchNorm2d)}
    assert {n.replace("/", ".") for n in m.networks["norms"].layers} == norms
    terms = m.losses(Two().batch(0), None)
    terms["seg_teacher"]().backward()
    for name, p in student.named_parameters():
        assert (p.grad is None) == (name.rsplit(".", 1)[0] in norms), name
    assert all(p.grad is not None for p in m.networks["norms"].parameters())


def test_each_modality_updates_its_own_statistics():
    student, _ = nets()
    m = UMMKD(student.train())
    batch = Two().batch(0)
    own = copy.deepcopy(student.state_dict())
    other = copy.deepcopy(m.networks["norms"].state_dict())
    m.losses(batch, None)["seg_teacher"]()
    assert all(torch.equal(v, own[k]) for k, v in student.state_dict().items())
    assert any(not torch.equal(v, other[k]) for k, v in m.networks["norms"].state_dict().items())


def test_without_the_other_modality_it_is_plain_training(tmp_path):
    from unpaired_kd.methods.single import Single

    class AsSingle(UMMKD):
        def segmentation(self, logits, label):
            from unpaired_kd.losses.segmentation import segmentation_loss

            return segmentation_loss(logits, label, bce=0.5)

    a, _ = nets()
    b = copy.deepcopy(a)
    from unpaired_kd.training.learner import Learner
    from unpaired_kd.training.settings import Settings

    s = Settings(epochs=2, steps=3, bars=False, device="cpu", precision="fp32")
    Learner(AsSingle(a), Two(), tmp_path / "a", settings=s, weights=dict(seg_teacher=0, kl=0)).fit()
    Learner(Single(b), Two(), tmp_path / "b", settings=s).fit()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_killed_and_resumed_it_ends_the_same(tmp_path):
    from unpaired_kd.training.learner import Learner
    from unpaired_kd.training.settings import Settings

    def build_one(folder):
        return Learner(
            UMMKD(nets()[0]),
            Two(),
            tmp_path / folder,
            settings=Settings(epochs=3, steps=2, bars=False, device="cpu", precision="fp32"),
        )

    build_one("whole").fit()
    broken = build_one("broken")
    broken.tell = lambda row: (
        (_ for _ in ()).throw(KeyboardInterrupt) if row["epoch"] == 1 else None
    )
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    build_one("broken").fit()
    a, b = (load_checkpoint(tmp_path / f / "last.pt")["networks"] for f in ("whole", "broken"))
    assert all(torch.equal(v, b[n][k]) for n in a for k, v in a[n].items())


def test_the_student_is_a_plain_network(tmp_path):
    student, _ = nets()
    run(tmp_path, UMMKD(student), Two())
    fresh = make_network("unet", student.config)
    x = Two().batch(0)["student"].image
    student.eval(), fresh.eval()
    assert not torch.allclose(fresh(x), student(x), atol=1e-3)  # so that the last line can fail
    assert list(student.state_dict()) == list(
        fresh.state_dict()
    )  # nothing of the method hangs on it
    load_weights(fresh, student.state_dict(), "student")
    assert torch.allclose(
        fresh(x), student(x), atol=1e-5
    )  # memory layouts differ, and with them the last digits


def test_weighting_by_rarity_needs_the_rare_class_right():
    y = torch.zeros(1, 8, 8, dtype=torch.long)
    y[0, 0, 0] = 1
    wrong_rare = torch.full((1, 1, 8, 8), -4.0)
    wrong_common = torch.full((1, 1, 8, 8), -4.0)
    wrong_common[0, 0, 0, 0] = 4.0
    wrong_common[0, 0, 4, 4] = 4.0
    assert rarity_weighted_cross_entropy(wrong_rare, y) > 10 * rarity_weighted_cross_entropy(
        wrong_common, y
    )
    assert torch.isfinite(rarity_weighted_cross_entropy(wrong_rare, torch.zeros_like(y)))


def test_both_modalities_have_the_channels_that_the_student_reads(tmp_path):
    from dataclasses import replace

    class Colour(Two):
        def one(self, name, step):
            b = super().one(name, step)
            return replace(b, image=b.image.expand(-1, 3, -1, -1)) if name == "teacher" else b

    with pytest.raises(
        InputError, match="teacher: the images have 3 channels, the student reads 1"
    ):
        run(tmp_path, UMMKD(nets()[0]), Colour())


def test_bad_input():
    with pytest.raises(InputError, match="rarity"):
        UMMKD(UNet(width=4), UmmkdOptions(ce="x"))
    with pytest.raises(InputError, match="BatchNorm"):
        OtherNorms(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(InputError):
        UMMKD(UNet(width=4, in_channels=1), UmmkdOptions(kl_direction="sideways")).losses(
            Two().batch(0), None
        )["kl"]()
