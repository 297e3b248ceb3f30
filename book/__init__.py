"""The rendered book: `python -m book` writes nbs/ as static pages into _book/.

`processors.py` and `renderer.py` are called by nbdev (settings.ini), so Quarto's pages and ours are
prepared by the same lines; `pages.py` renders one page with pandoc, `build.py` the whole.
"""
