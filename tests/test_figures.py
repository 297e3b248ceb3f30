"What a notebook shows of a figure: lines as lines, images at twice the density, and the caption."

import atexit
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from unpaired_kd.core import PIXELS_PER_INCH, Table, _draw_figure, draw_png, draw_svg

SHELL = pytest.importorskip("execnb.shell")
DRAW = "import matplotlib.pyplot as plt\nplt.figure().add_subplot().plot([0, 1]);"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def plain(width=2.0, height=1.0):
    "A figure that is full to its edge: matplotlib adds 0.1 inch on each side."
    fig = plt.figure(figsize=(width, height))
    fig.add_artist(plt.Rectangle((0, 0), 1, 1, transform=fig.transFigure))
    return fig


def with_image(a):
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.imshow(a)
    return fig


def test_an_inch_is_128_pixels_of_the_page():
    assert PIXELS_PER_INCH == 128
    head = draw_svg(plain()).split("viewBox")[0]
    sides = re.findall(r'(width|height)="([^"]+)"', head)
    assert sides == [("width", "282"), ("height", "154")]  # 2.2 x 1.2 inches


def test_pixels_are_twice_as_dense():
    data, size = draw_png(plain())
    assert size == {"width": 282, "height": 154}
    assert Image.open(io.BytesIO(data)).size == (563, 307)  # 256 an inch
    assert draw_png(plain(), 1)[1] == {"width": 281, "height": 153}  # half a pixel is lost


def test_a_picture_has_few_colours():
    image = np.random.default_rng(0).random((90, 90, 3))
    for colors in (256, 16):
        drawn = Image.open(io.BytesIO(draw_png(with_image(image), colors=colors)[0]))
        assert 2 < len(drawn.convert("RGB").getcolors()) <= colors


def test_lines_are_lines_unless_they_are_many():
    assert list(_draw_figure(plain())[0]) == ["image/svg+xml"]
    assert draw_svg(plain(), most=100) is None
    kinds, sizes = _draw_figure(with_image(np.eye(4)))
    assert list(kinds) == list(sizes) == ["image/png"]
    assert draw_svg(with_image(np.eye(4))) is None


def test_equal_figures_are_equal_files():
    assert draw_svg(plain()) == draw_svg(plain())
    assert draw_png(plain()) == draw_png(plain())


@pytest.fixture
def shell():
    with plt.rc_context():
        shell = SHELL.CaptureShell(mpl_format="png")
        for _ in range(2):  # the second call takes the place of the first
            shell.run("from unpaired_kd.core import set_up\nset_up(0)")
        yield shell
    atexit.unregister(shell.atexit_operations)
    SHELL.InteractiveShell._instance = None
    plt.switch_backend("agg")


def shown(shell, code):
    "(kinds of the first picture, Markdown) of a cell."
    outputs = [o["data"] for o in shell.run(code) if "data" in o]
    pictures = [[k for k in data if "image" in k] for data in outputs]
    texts = ["".join(data["text/markdown"]) for data in outputs if "text/markdown" in data]
    return [kinds for kinds in pictures if kinds], texts


def test_the_caption_stands_below_the_figure_once(shell):
    assert shown(shell, f'#| fig-cap: "A line."\n{DRAW}') == ([["image/svg+xml"]], ["*A line.*"])
    assert shown(shell, DRAW) == ([["image/svg+xml"]], [])


def test_a_cell_that_fails_has_no_caption(shell):
    assert shown(shell, '#| fig-cap: "A line."\n1 / 0') == ([], [])


def test_a_table_is_text_and_is_shown_as_a_table():
    table = Table("| a |\n|---|\n| 1 |")
    assert table == str(table) == repr(table) == table._repr_markdown_() == "| a |\n|---|\n| 1 |"
