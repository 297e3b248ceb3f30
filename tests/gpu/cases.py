"""Every method of the project as a study builds it: networks, options, batches; full or small."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.methods.registry import all_methods, make_method, method_class, options_of
from unpaired_kd.networks.registry import make_network

EPOCHS = 2  # what a method is told: enough for every stage, one epoch each
SEED = 0


@dataclass(frozen=True)
class Size:
    "How large the networks and batches of a method are."

    network: str = "unet"  # registered name, of student and teacher
    config: dict = field(default_factory=dict)  # its arguments
    side: int = 512  # of a patch, px or voxels
    batch: int = 16  # patches
    dims: int = 2  # spatial axes
    options: dict = field(default_factory=dict)  # changes to the method's preset


@dataclass(frozen=True)
class Case:
    "One method with one set of options."

    method: str  # name in the registry of methods
    preset: str  # of its options
    size: Size
    more: str = ""  # what tells it from another case of the same preset, e.g. "drit"

    @property
    def name(self) -> str:
        "E.g. `lotus recommended`, `cmedl recommended drit`."
        return " ".join(w for w in (self.method, self.preset, self.more) if w)


# LOTUS's images; also the size of a method that is not named below
PLAIN = Size("unet", dict(in_channels=3, classes=3, width=16), 512, 16)
SLICES = Size("unet_bilinear", dict(in_channels=1, classes=1, width=64), 256, 4)
CUBES = Size("light_unet", dict(in_channels=1, classes=1, width=8), 96, 2, 3)
FULL = {
    "cmedl": SLICES,
    "mutual": SLICES,
    "fusion": SLICES,
    "vpbsd": CUBES,
    "reconstruction": CUBES,
    "recalibrated": CUBES,
}

SMALL_PLAIN = Size("unet", dict(in_channels=3, classes=3, width=4), 32, 2)
SMALL_SLICES = Size(
    "unet", dict(in_channels=1, classes=1, width=4), 64, 2, options=dict(width=4, blocks=1, pool=2)
)
SMALL_CUBES = Size("light_unet", dict(in_channels=1, classes=1, width=2), 16, 2, 3)
SMALL_TEACHER = dict(
    encoder_config=dict(width=4, dim=8, depth=1, heads=2, tokens=2),
    inner=8,
    decoder=4,
    codes=8,
    code_dim=4,
)
SMALL = {
    "cmedl": SMALL_SLICES,
    "mutual": SMALL_SLICES,
    "fusion": SMALL_SLICES,
    "vpbsd": replace(SMALL_CUBES, options=SMALL_TEACHER),
    "reconstruction": SMALL_CUBES,
    "recalibrated": SMALL_CUBES,
}

# the release's first stage may take the whole run; half of it, so that the second is seen too
HALVES = {("lotus", "released"): dict(denoise_share=0.5)}
MORE = {"cmedl": {"drit": dict(i2i="drit")}}  # other ways through a method
EVERY_PRESET = ("lotus",)  # methods whose presets differ in what they compute


def methods() -> dict:  # name -> names of its presets
    "The methods of the project and their presets. A new method is here at once."
    return {name: tuple(cls.presets) or ("recommended",) for name, cls in all_methods().items()}


def case_of(
    method: str,  # name in the registry of methods
    preset: str,  # of its options
    small: bool,  # sizes for a test on the CPU
    more: str = "",  # a key of `MORE[method]`
) -> Case:
    "A method at one of its two sizes."
    size = SMALL.get(method, SMALL_PLAIN) if small else FULL.get(method, PLAIN)
    changes = HALVES.get((method, preset), {}) | MORE.get(method, {}).get(more, {})
    return Case(method, preset, replace(size, options=size.options | changes), more)


def cases(
    small: bool,  # sizes for a test on the CPU
    every: bool = False,  # every preset of every method
) -> list:  # of `Case`s
    "All methods: the preset `recommended`, others where they compute something else."
    found = []
    for method, presets in methods().items():
        chosen = presets if every or method in EVERY_PRESET else ("recommended",)
        found += [case_of(method, preset, small) for preset in chosen]
        found += [case_of(method, "recommended", small, more) for more in MORE.get(method, {})]
    return found


def network(
    size: Size,  # what to build
    name: str,  # whose first weights
):
    "A network with weights of its own."
    with seeded(SEED, name):
        return make_network(size.network, size.config)


class School:
    "Gives a method its teacher: fresh networks, or one that is trained first."

    def __init__(
        self,
        size: Size,  # of the networks
        student,  # network to be taught
        options,  # of the method
        train,  # function of a `Method`: trains it
    ):
        self.size = size
        self.student = student
        self.options = options
        self.train = train

    def expert(self):
        "Of random weights: nothing is learned here, only timed."
        return network(self.size, "teacher")

    def peer(self, of):
        "A second network."
        return network(self.size, "teacher")

    def pretrained(self, kind):
        "Trained now, as shortly as all else."
        first = kind.build(self.student, self.options, EPOCHS, SEED)
        self.train(first)
        return first.student


def train_case(
    case: Case,  # the method
    train,  # function of a `Method`: trains it
):
    "Build the case and train it; a teacher that must be trained before comes first."
    size = case.size
    student = network(case.size, "student")
    options = options_of(case.method, case.preset, size.options, size.side)
    school = School(size, student, options, train)
    teacher = method_class(case.method).teacher.give(school)
    train(make_method(case.method, student, teacher, options, EPOCHS, SEED, preset=case.preset))


def enlarged(
    coarse: Tensor,  # (B,*g)
    side: int,  # px
) -> Tensor:  # (B,*s)
    "Every cell of the grid becomes a block."
    for axis, n in enumerate(coarse.shape[1:], 1):
        coarse = coarse.repeat_interleave(-(-side // n), axis).narrow(axis, 0, side)
    return coarse


class Blocks:
    """Batches of noisy blocks of every class, made before they are asked for, on the device: a
    few of them in turn, so that no step waits for its batch."""

    def __init__(
        self,
        size: Size,  # of the networks and patches
        device="cpu",  # where the batches are
        kept: int = 2,  # different batches
    ):
        self.size = size
        self.device = device
        self.kept = kept
        self.made = {}

    def batch(
        self,
        step: int,  # which batch
        names=None,  # of the patches
        rank: int = 0,  # of the process
    ) -> dict:  # name -> `Batch`
        "Batch number `step` of every source."
        names = names or ("student", "teacher", "unlabelled")
        return {name: self.one(name, step % self.kept, rank) for name in names}

    def one(self, name, step, rank):
        "One batch of one source: `unlabelled` has no labels, the teacher's contrast is inverted."
        key = name, step, rank
        if key not in self.made:
            self.made[key] = self.drawn(*key).to(self.device)
        return self.made[key]

    def drawn(self, name, step, rank):
        "Draw a batch; a function of (name, step, rank)."
        size = self.size
        g = torch_rng(SEED, name, step, rank)
        classes = max(2, size.config["classes"])
        coarse = torch.randint(classes, (size.batch, *[8] * size.dims), generator=g)
        label = enlarged(coarse, size.side)
        noise = torch.rand(size.batch, size.config["in_channels"], *label.shape[1:], generator=g)
        image = 0.2 + 0.5 * label[:, None] / (classes - 1) + 0.3 * noise
        if name == "teacher":
            image = 1 - image
        groups = [""] * size.batch
        return Batch(image.clamp(0, 1), None if name == "unlabelled" else label, groups, groups)
