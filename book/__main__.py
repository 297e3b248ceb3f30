"""`python -m book`: nbs/ as a folder of static pages. `--plain` leaves Quarto aside."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from book.build import build, with_quarto


def main():
    parser = argparse.ArgumentParser(prog="python -m book", description=__doc__)
    parser.add_argument("--out", default="_book", help="the folder that is written")
    parser.add_argument("--plain", action="store_true", help="not with Quarto, even if it is here")
    given = parser.parse_args()
    start = time.time()
    folder = Path(given.out).resolve()
    os.chdir(Path(__file__).parents[1])
    if shutil.which("quarto") and not given.plain:
        with_quarto(folder)
        found = []
    else:
        pages = build(folder)
        found = [f"{page.name}: {c}" for page in pages for c in page.complaints]
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    print(f"{folder}/index.html ({time.time() - start:.0f} s)")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
