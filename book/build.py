"""The whole book: `build(folder)` prepares and renders every chapter, two at a time.

Nothing is executed and nothing is asked of the network. The pages need no server: links are
relative, and the search's index is a script.
"""

import html
import json
import os
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote

from nbdev.config import get_config

from book.pages import Page, render
from book.reading import entries, flat, main_path, neighbours, order
from book.renderer import own_site

HERE = Path(__file__).parent
SHARED = ("styles.css", "fonts", "favicon.svg")  # in nbs/, for Quarto too
OWN = ("book.css", "book.js")


# ---------------------------------------------------------------- prepare and render
def make_page(name, folder):
    "Prepare and render one chapter; a complaint where nbdev or a processor cannot."
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults

    os.environ["IN_TEST"] = "1"
    nb = read_nb(get_config().nbs_path / name)
    try:
        FilterDefaults()(nb)
    except Exception as e:
        return Page(name, complaints=[f"cannot be prepared: {type(e).__name__}: {e}"])
    return render(nb, name, Path(folder))


def make_pages(names, folder, workers=2):
    "All pages, in the order of `names`; each worker imports the library once."
    folder.mkdir(parents=True, exist_ok=True)
    if workers < 2:
        return [make_page(name, folder) for name in names]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(make_page, names, [str(folder)] * len(names)))


# ---------------------------------------------------------------- links
def as_page(target, name):
    "A link of a chapter as a link of its page: other chapters, and our own site, relative."
    up = "../" * name.count("/")
    site = own_site()
    if target == site or target.startswith((f"{site}/", f"{site}#")):
        target = up + (target[len(site) :].lstrip("/") or "index.html")
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return target
    path, hash_, anchor = target.partition("#")
    return re.sub(r"\.ipynb$", ".html", path) + hash_ + anchor


def rewrite(body, name):
    "The page's HTML with its links to chapters turned into links to pages."
    parts = re.split(r"(<script.*?</script>)", body, flags=re.S)

    def change(found):
        return f'{found[1]}"{html.escape(as_page(html.unescape(found[2]), name))}"'

    parts[::2] = [re.sub(r'(<a [^>]*?href=)"([^"]*)"', change, part) for part in parts[::2]]
    return "".join(parts)


def copy_files(page, folder):
    "Files of nbs/ that a page shows or links to."
    nbs = get_config().nbs_path
    for target in re.findall(r'(?:href|src)="([^"#?:]+)"', page.body):
        path = Path(os.path.normpath(Path(page.name).parent / unquote(target)))
        source = nbs / path
        if not path.parts[0].startswith("..") and source.is_file() and source.suffix != ".ipynb":
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / path)


# ---------------------------------------------------------------- the frame of a page
def link(name, text, up, marks=""):
    "A link to a chapter."
    return f'<a href="{up}{name[:-6]}.html"{marks}>{html.escape(text)}</a>'


def sidebar_html(found, page, named, up, depth=0):
    "The nested list of chapters; only the sections around the page stand open."
    lines = []
    for entry in found:
        if isinstance(entry, str):
            marks = ' aria-current="page"' if entry == page else ""
            kind = ' class="main"' if entry in main_path() else ""
            lines.append(f"<li{kind}>{link(entry, named[entry], up, marks)}</li>")
        else:
            inside = list(flat(entry[1]))
            opened = " open" if page in inside else ""
            kind = ' class="through"' if set(inside) & set(main_path()) else ""
            rest = sidebar_html(entry[1], page, named, up, depth + 1)
            lines.append(
                f"<li{kind}><details{opened}><summary>{entry[0]}</summary>{rest}</details></li>"
            )
    return "<ul>" + "".join(lines) + "</ul>"


def after(page, named, up):
    "Links at a page's end: the chapters before and after it."
    before, later = neighbours(page, order())
    ends = [("prev", "← {}", before), ("next", "{} →", later)]
    parts = [
        f'<span class="{kind}">{sign.format(link(n, named[n], up))}</span>'
        for kind, sign, n in ends
        if n
    ]
    return f'<nav class="around">{"".join(parts)}</nav>'


def frame(page, named, template):
    "A rendered page in the frame that all pages share."
    up = "../" * page.name.count("/")
    config = get_config()
    description = html.escape(page.description or config.description)
    title = page.title if page.title == config.title else f"{page.title} – {config.title}"
    values = {
        "title": html.escape(title),
        "heading": html.escape(page.title),
        "description": description,
        "claim": f'<p class="claim">{html.escape(page.description)}</p>'
        if page.description
        else "",
        "up": up,
        "site": own_site(),
        "address": f"{own_site()}/{page.name[:-6]}.html",
        "book": html.escape(config.title),
        "repository": config.git_url,
        "sidebar": sidebar_html(entries(), page.name, named, up),
        "contents": page.contents,
        "body": rewrite(page.body, page.name),
        "after": after(page.name, named, up),
        "kind": f"page-{Path(page.name).stem}",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], template)


# ---------------------------------------------------------------- search
def passages(page):
    "(anchor, heading, text) of each section of a page, without its code."
    body = re.sub(r"<(script|style|math|pre|svg)\b.*?</\1>", " ", page.body, flags=re.S)
    parts = re.split(r'<h[1-4][^>]*? id="([^"]+)"[^>]*>(.*?)</h[1-4]>', body, flags=re.S)
    heads = [("", page.title), *zip(parts[1::3], parts[2::3], strict=True)]
    for (anchor, heading), text in zip(heads, parts[::3], strict=True):
        words = [
            re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", t))).strip()
            for t in (heading, text)
        ]
        yield anchor, *words


def search_index(pages):
    "The script that gives the search its index."
    places = [
        [number, anchor, heading, text]
        for number, page in enumerate(pages)
        for anchor, heading, text in passages(page)
    ]
    listed = [[f"{page.name[:-6]}.html", page.title] for page in pages]
    data = json.dumps({"pages": listed, "places": places}, ensure_ascii=False)
    return f"window.bookIndex = {data};\n".replace("</", "<\\/")


# ---------------------------------------------------------------- the folder
MARK = ".unpaired_kd_book"  # a file in each folder that holds a book: only such a one is replaced


def make_room(folder):
    "An empty folder. `SystemExit` where something lies that is no book of ours."
    if folder.is_dir() and not folder.is_symlink() and (folder / MARK).exists():
        shutil.rmtree(folder)
    elif folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        sys.exit(f"--out {folder} holds something else than a book: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def build(folder, workers=2):
    """Write the whole book into `folder`; returns its pages, with what is wrong with each.
    `SystemExit` where something lies that is no book."""
    folder = Path(folder)
    make_room(folder)
    names = order()
    pages = make_pages(names, folder, workers)
    named = {page.name: page.title for page in pages}
    template = (HERE / "frame.html").read_text(encoding="utf-8")
    for page in pages:
        target = folder / f"{page.name[:-6]}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(frame(page, named, template), encoding="utf-8")
        copy_files(page, folder)
    (folder / "search-index.js").write_text(search_index(pages), encoding="utf-8")
    for name in SHARED:
        source = get_config().nbs_path / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        elif source.exists():
            shutil.copyfile(source, folder / name)
    for name in OWN:
        shutil.copyfile(HERE / name, folder / name)
    social = get_config().nbs_path / "images/social.png"
    if social.exists():
        (folder / "images").mkdir(exist_ok=True)
        shutil.copyfile(social, folder / "images/social.png")
    return pages


def with_quarto(folder):
    "The same book by the Quarto program, into `folder`. `SystemExit` as for `build`."
    import subprocess

    make_room(folder)
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    code = "from nbdev.serve import proc_nbs; proc_nbs()"
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    subprocess.run(["quarto", "render", "--no-execute"], cwd="_proc", check=True)
    shutil.copytree("_proc/_docs", folder, dirs_exist_ok=True)
