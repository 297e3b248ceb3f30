"""A browser looks at every page of the built book, at the width of a desktop and of a phone.

`python tests/gates/browser.py _book` looks at one that is there. Chromium is driven through its own
protocol (a web socket); where there is none, that is said and nothing fails.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from common import finish

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP = (1400, 900)
PHONE = (390, 844)
TERM = "feature variation"  # what the search must find
EARLY = 60  # pages with a picture or a table within two screens

WIDE = """(() => {
  document.querySelectorAll("main details").forEach((d) => (d.open = true));
  const name = (e) => e.textContent.trim().slice(0, 50);
  const cut = (e) => e.scrollWidth - e.clientWidth > 1;
  const boxes = [...document.querySelectorAll("main pre")];
  const rows = [...document.querySelectorAll("main pre > code.sourceCode > span")];
  const high = (e) => e.getClientRects().length > 1 || e.offsetHeight > 34;
  const found = {
    cut: boxes.filter(cut).map(name),
    boxes: boxes.length,
    wrapped: rows.filter(high).map(name),
    tables: [...document.querySelectorAll("main table")].filter(cut).map(name),
    missing: [...document.images].filter((i) => !i.naturalWidth).map((i) => i.src.slice(-80)),
    over: document.documentElement.scrollWidth - innerWidth,
  };
  document.querySelectorAll("main details").forEach((d) => (d.open = false));
  const seen = [...document.querySelectorAll("main img, main table")]
    .filter((e) => !e.closest("details:not([open])"));
  const tops = seen.map((e) => e.getBoundingClientRect()).filter((r) => r.height > 20);
  found.first = Math.min(...tops.map((r) => r.top + scrollY), Infinity) + "";
  found.early = [...document.querySelectorAll("main img")].filter(
    (i) => i.getBoundingClientRect().top + scrollY < 2 * innerHeight).length;
  return found;
})()"""
NARROW = """(() => {
  document.querySelectorAll("main details").forEach((d) => (d.open = true));
  const over = document.documentElement.scrollWidth - innerWidth;
  const out = [...document.querySelectorAll("main *")].find((e) =>
    e.getBoundingClientRect().right > innerWidth + 1 &&
    !e.closest("pre, table, math, .math") );
  return { over, who: over > 0 && out ? out.outerHTML.replace(/\\s+/g, " ").slice(0, 90) : "" };
})()"""
SEARCH = """(async () => {
  const query = document.getElementById("query");
  query.focus();
  query.value = TERM;
  query.dispatchEvent(new Event("input"));
  for (let i = 0; i < 100 && !document.querySelector("#results a"); i++)
    await new Promise((done) => setTimeout(done, 50));
  return [...document.querySelectorAll("#results a")].map((a) => a.textContent.slice(0, 60));
})()"""
SLIDES = """(() => [...document.querySelectorAll(".ukd-slides")].map((box) => {
  const shown = () => [...box.querySelectorAll("img, svg")]
    .filter((i) => i.getClientRects().length).map((i) => i.src || i.outerHTML).join();
  return [...box.querySelectorAll("input[type=range]")].map((slider) => {
    const before = shown();
    const old = slider.value;
    slider.value = old === slider.max ? slider.min : slider.max;
    for (const kind of ["input", "change"]) slider.dispatchEvent(new Event(kind, {bubbles: true}));
    return before !== shown() && before !== "";
  });
}).flat())()"""


# ---------------------------------------------------------------- the browser
class Tab:
    "One tab of a running Chromium."

    def __init__(self, address):
        import websocket

        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=60)
        self.count = 0
        for part in ("Page", "Runtime"):
            self.ask(f"{part}.enable")

    def ask(self, method, **given):
        "Call a method of the protocol; returns its result."
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": given}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("id") == self.count:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']['message']}")
                return said["result"]

    def size(self, width, height):
        "Set the size of the window."
        given = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setDeviceMetricsOverride", **given)

    def open(self, address):
        "Load a page, its pictures and its font too."
        self.ask("Page.navigate", url=address)
        ready = (
            "new Promise(done => { const go = () => document.fonts.ready.then(() => done(true)); "
            "document.readyState === 'complete' ? go() : addEventListener('load', go); })"
        )
        for _ in range(100):
            if self.run("location.href") == address:
                break
            time.sleep(0.02)
        self.run(ready)

    def run(self, script):
        "The value of a script, a promise's too."
        given = dict(expression=script, awaitPromise=True, returnByValue=True)
        said = self.ask("Runtime.evaluate", **given)
        if "exceptionDetails" in said:
            raise RuntimeError(said["exceptionDetails"]["exception"].get("description", "?"))
        return said["result"].get("value")


def program():
    "The path of a Chromium, or None."
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def started(path):
    "A tab of a Chromium without a window; it ends with the block."
    with tempfile.TemporaryDirectory(prefix="gate_", ignore_cleanup_errors=True) as home:
        command = [path, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={home}", "about:blank"]
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, **quiet)
        try:
            port = Path(home) / "DevToolsActivePort"
            for _ in range(300):
                if port.exists() and port.read_text().strip():
                    break
                time.sleep(0.1)
            number = port.read_text().splitlines()[0]
            listed = urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list", timeout=20)
            tabs = [t for t in json.load(listed) if t["type"] == "page"]
            yield Tab(tabs[0]["webSocketDebuggerUrl"])
        finally:
            process.terminate()
            process.wait(20)


# ---------------------------------------------------------------- what is looked at
def look_at(tab, address):
    "What a page shows on a desktop and on a phone."
    tab.size(*DESKTOP)
    tab.open(address)
    wide = tab.run(WIDE)
    slides = tab.run(SLIDES)
    tab.size(*PHONE)
    return {**wide, "narrow": tab.run(NARROW), "slides": slides}


def faults(name, seen):
    "What is wrong with a page, from what a browser saw of it."
    yield from (f"{name}: a box is cut off at {DESKTOP[0]} px: {box!r}" for box in seen["cut"])
    yield from (f"{name}: no picture at {place}" for place in seen["missing"])
    if seen["over"] > 0:
        yield f"{name}: {seen['over']} px wider than a window of {DESKTOP[0]} px"
    if seen["narrow"]["over"] > 0:
        who = seen["narrow"]["who"]
        yield f"{name}: {seen['narrow']['over']} px wider than a phone ({PHONE[0]} px): {who}"
    if not all(seen["slides"]):
        yield f"{name}: a slider changes no picture"


def count_early(seen):
    "How many pages have a picture or a table within two screens."
    return sum(float(page["first"]) < 2 * DESKTOP[1] for page in seen.values())


def summary(seen):
    "Lines with the counts over all pages."
    return [
        f"{sum(len(p['cut']) for p in seen.values())} of {sum(p['boxes'] for p in seen.values())} "
        f"boxes cut off; {sum(len(p['wrapped']) for p in seen.values())} lines of code wrapped",
        f"{sum(bool(p['tables']) for p in seen.values())} pages with a table that scrolls by itself"
        f" at {DESKTOP[0]} px",
        f"{sum(p['narrow']['over'] > 0 for p in seen.values())} of {len(seen)} pages slide sideways"
        f" at {PHONE[0]} px",
        f"{count_early(seen)} pages have a picture or a table within two screens",
        f"{sum(len(p['slides']) for p in seen.values())} sliders",
    ]


def look(folder):
    "(complaints, lines to print) about the book in a folder."
    try:
        import websocket  # noqa: F401
    except ImportError:
        return [], ["no browser looked: the package websocket-client is missing"]
    path = program()
    if path is None:
        return [], [f"no browser looked: none of {', '.join(PROGRAMS)} is installed"]
    start = time.time()
    found = []
    seen = {}
    with started(path) as tab:
        for file in sorted(Path(folder).rglob("*.html")):
            name = file.relative_to(folder).as_posix()
            seen[name] = look_at(tab, file.as_uri())
            found += faults(name, seen[name])
        tab.size(*DESKTOP)
        tab.open((Path(folder) / "index.html").as_uri())
        hits = tab.run(SEARCH.replace("TERM", json.dumps(TERM)))
    if not any("ariation" in hit for hit in hits):
        found.append(f"the search for {TERM!r} finds {hits[:3]}")
    if seen["index.html"]["early"] < 3:
        found.append(
            f"index.html: {seen['index.html']['early']} pictures within two screens, not 3"
        )
    if (early := count_early(seen)) < EARLY:
        found.append(f"{early} pages have a picture or a table within two screens, not {EARLY}")
    lines = [*summary(seen), f"looked at by {Path(path).name} in {time.time() - start:.0f} s"]
    if os.environ.get("UKD_BOOK_SEEN"):
        Path(os.environ["UKD_BOOK_SEEN"]).write_text(json.dumps(seen, indent=1))
    return found, lines


def main(folder="_book"):
    start = time.time()
    found, lines = look(Path(folder).resolve())
    print("\n".join(f"  {line}" for line in lines))
    finish("browser", found, f"the pages of {folder}", start)


if __name__ == "__main__":
    main(*sys.argv[1:])
