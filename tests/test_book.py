"""The rendered book: what its processors change, what its renderer says, what a page holds."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
pytest.importorskip("nbdev")

from execnb.nbio import dict2nb  # noqa: E402

from book import (  # noqa: E402
    build,
    generated,
    pages,
    processors,
    reading,
    renderer,
    sources,
    text,
)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    "nbdev looks for settings.ini from where it is called."
    monkeypatch.chdir(ROOT)


def notebook(*cells, name="methods/page.ipynb"):
    "A notebook of (kind, source) or (kind, source, outputs), as nbdev's processors get it."
    listed = [
        dict(cell_type=kind, source=source, metadata={}, outputs=list(outputs))
        for kind, source, *outputs in cells
    ]
    nb = dict2nb(dict(cells=listed, metadata={}, nbformat=4, nbformat_minor=5))
    nb.path_ = str(ROOT / "nbs" / name)
    return nb


def processed(process, *cells):
    "The cells after one processor, as nbdev calls it."
    nb = notebook(*cells)
    process = process(nb) if isinstance(process, type) else process
    if hasattr(process, "begin"):
        process.begin()
    for cell in nb.cells:
        process(cell)
    if hasattr(process, "end"):
        process.end()
    return nb.cells


def changed(process, text):
    "A Markdown cell after one processor."
    return processed(process, ("markdown", text))[0].source


# ---------------------------------------------------------------- processors
def test_a_bold_quotation_is_a_callout():
    text = "before\n\n> **Paper, code, and here**\n>\n> | a |\n> |---|\n\nafter"
    box = '::: {.callout-note title="Paper, code, and here"}\n\n| a |\n|---|\n\n:::'
    assert changed(processors.boxes, text) == f"before\n\n{box}\n\nafter"


def test_a_note_keeps_its_first_line():
    assert changed(processors.boxes, "> **Note.** Short.\n> More.") == (
        '::: {.callout-note title="Note"}\n\nShort.\nMore.\n\n:::'
    )


@pytest.mark.parametrize("text", ["> a claim", "```\n> **code**\n```", "> plain **bold**"])
def test_other_quotations_stay(text):
    assert changed(processors.boxes, text) == text


def test_sources_are_cited_and_listed_once():
    link = "[Poles et al., 2024](../references.ipynb#poles2024lotus)"
    cells = processed(processors.citations, ("markdown", f"({link}), again {link}, `{link}`"))
    assert cells[0].source.count("(#ref-poles2024lotus)") == 2
    assert "`[Poles" in cells[0].source and "references.ipynb" in cells[0].source
    assert cells[-1].source.count("#ref-poles2024lotus") == 1 and "Osteocytes" in cells[-1].source


def test_an_unknown_source_has_no_entry():
    cells = processed(processors.citations, ("markdown", "[X](references.ipynb#nobody)"))
    assert [c.source for c in cells] == ["[X](#ref-nobody)"]


def test_figures_are_numbered():
    text = "[Figure](#fig-a) and [figure](#fig-b-c), `[figure](#fig-a)`, [a figure](#fig-a)"
    said = changed(processors.figures, text)
    assert said == "@fig-a and @fig-b-c, `[figure](#fig-a)`, [a figure](#fig-a)"


def test_set_up_is_folded_into_one():
    cells = processed(
        processors.fold,
        ("code", "import os"),
        ("code", "from a import b\n\nset_up(0)"),
        ("code", "x = 1"),
        ("code", "#| code-fold: true\nplot()"),
        ("code", "set_up(0)\nprint(1)"),
    )
    assert len(cells) == 4
    assert cells[0].source.startswith(processors.SETS_UP)
    assert cells[0].source.endswith("import os\n\nfrom a import b\n\nset_up(0)")
    assert cells[1].source == "x = 1" and "Code of the drawing" in cells[2].source
    assert cells[3].source == "set_up(0)\nprint(1)"


@pytest.mark.parametrize(
    "text", ["*It's a {}.*", "**Figure.** It's a {}.", "**Figure.** *It's a {}.*"]
)
def test_a_stored_caption_goes(text):
    caption = text.format("cap \\* tion")
    out = dict(output_type="display_data", data={"text/markdown": caption}, metadata={})
    other = dict(output_type="display_data", data={"text/markdown": "| a |"}, metadata={})
    source = '#| fig-cap: "It\'s a cap * tion."\nplot()'
    assert list(processed(processors.tidy, ("code", source, out, other))[0].outputs) == [other]


def test_noise_goes_and_messages_stay():
    bar = dict(output_type="stream", name="stderr", text="\rrun:  0%|  | 0/3\rrun: 100%|##| 3/3\n")
    kernel = "[IPKernelApp] ERROR | KeyboardInterrupt\nunknown parameter\n"
    said = dict(output_type="stream", name="stderr", text=kernel)
    cell = processed(processors.tidy, ("code", "run()", bar, said))[0]
    assert [o["text"] for o in cell.outputs] == ["unknown parameter\n"]


def test_widgets_go():
    seen = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "x"}
    out = dict(output_type="display_data", data=seen, metadata={})
    assert processed(processors.widgets, ("code", "show()", out))[0].outputs == []


# ---------------------------------------------------------------- renderer
@dataclass
class Parent:
    a: int = 1  # the first
    # line goes on


@dataclass
class Child(Parent):
    b: str = "x|y"  # of `Parent`, a_b


def function(
    x,  # an image, (B,C)
    *rest,
    flag: bool = False,
    **more,  # passed on
) -> list[int]:  # the sizes
    "Says."
    return []


def test_arguments_as_written():
    rows = [(r.name, r.kind, r.default, r.meaning) for r in renderer.arguments(function)]
    assert rows == [
        ("x", "", "", "an image, (B,C)"),
        ("*rest", "", "", ""),
        ("flag", "bool", "False", ""),
        ("**more", "", "", "passed on"),
        ("returns", "list[int]", "", "the sizes"),
    ]


def test_fields_of_a_dataclass_and_its_parents():
    rows = [(r.name, r.default, r.meaning) for r in renderer.arguments(Child)]
    assert rows == [("a", "1", "the first line goes on"), ("b", "'x|y'", "of `Parent`, a_b")]
    text = renderer.Entry(Child)._repr_markdown_()
    assert "### Child" in text and "[class" in text and "`'x\\|y'`" in text and "a\\_b" in text


def test_no_signature_is_repeated():
    text = renderer.Entry(function)._repr_markdown_()
    assert "def " not in text and "VAR_" not in text and "Says." not in text
    assert "Says." in renderer.Entry(function)._repr_markdown_(docstring=True)


# ---------------------------------------------------------------- sources, reading, generated
def test_a_bib_entry_as_text():
    bib = "@article{k,\n author = {Doll{\\'a}r, Piotr and Lee, T.-C. B.},\n title = {On {X}},\n"
    bib += " journal = {arXiv preprint arXiv:2101.00001},\n year = {2021}\n}\n"
    entry = sources.read_bib(bib)["k"]
    assert sources.as_text(entry) == (
        "Dollár, P. and Lee, T. C. B. (2021). [*On X*](https://arxiv.org/abs/2101.00001). "
        "arXiv preprint arXiv:2101.00001."
    )


def test_the_main_path_is_in_the_order_of_reading():
    path = reading.main_path()
    order = reading.order()
    assert 8 <= len(path) <= 14 and [c for c in order if c in path] == path
    assert order[0] == "index.ipynb" and len(order) == len(set(order))


def test_links_of_a_box_are_moved():
    text = "[a](../x.ipynb#b) [c](#d) [e](https://f) `[g](h)` [i](j.ipynb)"
    assert generated.moved(text, "methods/m.ipynb") == (
        "[a](x.ipynb#b) [c](methods/m.ipynb#d) [e](https://f) `[g](h)` [i](methods/j.ipynb)"
    )


# ---------------------------------------------------------------- pages
def test_links_lead_to_pages():
    site = build.own_site()
    assert build.as_page("../a/b.ipynb#c", "x/y.ipynb") == "../a/b.html#c"
    assert build.as_page(f"{site}/a/b.html#c", "x/y.ipynb") == "../a/b.html#c"
    assert (
        build.as_page("https://example.org/a.ipynb", "x/y.ipynb") == "https://example.org/a.ipynb"
    )


def test_a_page_is_searched_without_its_code():
    body = '<p>one</p><h2 id="h">Two <em>x</em></h2><pre>code</pre><p>three &amp;</p>'
    page = pages.Page("a.ipynb", title="T", body=body)
    assert list(build.passages(page)) == [("", "T", "one"), ("h", "Two x", "three &")]
    index = build.search_index([page])
    assert json.loads(index.removeprefix("window.bookIndex = ").rstrip(";\n"))["pages"] == [
        ["a.html", "T"]
    ]


def test_a_chapter_becomes_a_page(tmp_path):
    page = build.make_page("losses/segmentation.ipynb", tmp_path)
    assert page.complaints == [] and page.title
    assert page.body.count('class="api"') > 2 and "VAR_" not in page.body
    assert 'class="badges"' in page.body and "code-fold" in page.body


def test_only_a_book_is_replaced(tmp_path):
    own = tmp_path / "thesis"
    own.mkdir()
    (own / "thesis.tex").write_text("years")
    link = tmp_path / "link"
    link.symlink_to(own)
    for place in (own, link, own / "thesis.tex"):
        with pytest.raises(SystemExit, match="something else than a book"):
            build.make_room(place)
    assert (own / "thesis.tex").read_text() == "years"

    book = tmp_path / "new" / "book"
    build.make_room(book)
    (book / "old.html").touch()
    build.make_room(book)
    assert [p.name for p in book.iterdir()] == [build.MARK]


def test_options_stand_at_the_top_of_a_cell():
    cell = '#| default_exp core\n#| fig-cap: "a: b"\nx = 1\n#| hide'
    assert text.options(cell) == {"default_exp": "", "fig-cap": "a: b"}
    assert text.without_options(cell) == "x = 1\n#| hide"  # which the gate `sources` refuses
