"""What follows an exported definition on its page: name, source link, table of arguments.

The code itself stands above it in the book, so no signature is repeated. nbdev calls `Entry` for
each exported name (settings.ini: `renderer = book.renderer.Entry`).
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import tokenize
from dataclasses import dataclass
from functools import cache, cached_property
from io import StringIO

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup


@dataclass
class Argument:
    "One argument or field, as its definition writes it."

    name: str
    kind: str = ""
    default: str = ""
    meaning: str = ""


def own_definition(symbol):
    "(its syntax tree, its source) of a function or class; (None, '') where there is no source."
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(symbol)))
        return ast.parse(text).body[0], text
    except (OSError, TypeError, SyntaxError, IndexError):
        return None, ""


def comments(text):
    "{line: comment} of a piece of source, and the lines that are only a comment."
    found = {}
    only = set()
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = re.sub(r"^#\s?|\s*# noqa.*$", "", token.string).strip()
            if not token.line[: token.start[1]].strip():
                only.add(token.start[0])
    return found, only


def meaning_at(line, said, only):
    "The comment behind a line, with the lines of comment that follow it."
    parts = [said.get(line, "")] if line not in only else []
    line += 1
    while parts and parts[0] and line in only:
        parts.append(said[line])
        line += 1
    return " ".join(p for p in parts if p)


def of_function(node, said, only):
    "The arguments of a function's syntax tree, without `self`."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [("", p, d) for p, d in zip(plain, defaults, strict=True)]
    rows += [("*", a.vararg, None)] if a.vararg else []
    rows += [("", p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    rows += [("**", a.kwarg, None)] if a.kwarg else []
    for star, p, default in rows:
        if p.arg in ("self", "cls") and p is plain[0]:
            continue
        kind = ast.unparse(p.annotation) if p.annotation else ""
        value = ast.unparse(default) if default is not None else ""
        last = default.end_lineno if default is not None else p.end_lineno
        yield Argument(star + p.arg, kind, value, meaning_at(last, said, only))
    if node.returns is not None and not (
        isinstance(node.returns, ast.Constant) and node.returns.value is None
    ):
        last = node.returns.end_lineno
        line = next((n for n in range(last, node.body[0].lineno) if n in said), last)
        yield Argument("returns", ast.unparse(node.returns), "", meaning_at(line, said, only))


def of_fields(node, said, only):
    "The fields of a dataclass's own body."
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            value = ast.unparse(line.value) if line.value is not None else ""
            kind = ast.unparse(line.annotation)
            yield Argument(line.target.id, kind, value, meaning_at(line.end_lineno, said, only))


def bare(symbol):
    "The function behind a property, a class method or what wraps one."
    for name in ("fget", "func", "__func__"):
        symbol = getattr(symbol, name, symbol)
    return symbol


def arguments(symbol):
    "The arguments of a function or class; the fields of a dataclass, its parents' first."
    if inspect.isclass(symbol) and dataclasses.is_dataclass(symbol):
        found = {}
        for parent in reversed(symbol.__mro__):
            node, text = own_definition(parent) if dataclasses.is_dataclass(parent) else (None, "")
            if isinstance(node, ast.ClassDef):
                found |= {f.name: f for f in of_fields(node, *comments(text))}
        return list(found.values())
    if inspect.isclass(symbol):
        symbol = symbol.__dict__.get("__init__")
    symbol = bare(symbol)
    node, text = own_definition(symbol) if symbol else (None, "")
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    return list(of_function(node, *comments(text)))


def code(text):
    "A piece of code in a table's cell."
    text = re.sub(r"\s+", " ", text)
    if not text:
        return ""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|")


def prose(text):
    "A comment in a table's cell: signs that Markdown would read stay as they are."
    parts = re.split(r"(`[^`]+`|\$[^$]+\$)", text)
    plain = [re.sub(r"([\\*_<>\[\]#~^@$])", r"\\\1", p) for p in parts[::2]]
    parts[::2] = plain
    return "".join(parts).replace("|", "\\|")


@cache
def names():
    "nbdev's index of exported names, made once for a process."
    return NbdevLookup()


@cache
def documented(address):
    "Whether the page at nbdev's address of a name has an entry for it: only public names do."
    path, _, name = address.partition(".html#")
    module = path.removeprefix(own_site()).strip("/").replace("/", ".")
    try:
        found = importlib.import_module(f"{get_config().lib_name}.{module}")
    except ImportError:
        return False
    return name in {public.lower() for public in getattr(found, "__all__", ())}


def own_site():
    "The address of the published book."
    config = get_config()
    return config.doc_host + config.doc_baseurl


def linked(text):
    "A type that is one of our public names, as a link to where it is explained."
    address = names().doc(text.strip("`"))
    return f"[{text}]({address})" if address and documented(address) else text


def table(rows):
    "The arguments as a Markdown table; columns that would be empty are left out."
    columns = {
        "argument": [code(r.name) if r.name != "returns" else "*returns*" for r in rows],
        "type": [linked(code(r.kind)) for r in rows],
        "default": [code(r.default) for r in rows],
        "meaning": [prose(r.meaning) for r in rows],
    }
    columns = {k: v for k, v in columns.items() if any(v)}
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Entry:
    "A name, where its source is, and a table of its arguments if their comments say something."

    def __init__(self, symbol, name=None, title_level=3):
        self.symbol = symbol
        self.name = name or getattr(symbol, "__qualname__", str(symbol))
        self.level = title_level

    def kind(self):
        "What the name is, in a word."
        if inspect.isclass(self.symbol):
            return "class"
        if isinstance(self.symbol, property | cached_property):
            return "property"
        return "method" if "." in self.name else "function"

    def source(self):
        "A link to the line of the repository where the definition stands."
        place = bare(self.symbol)
        try:
            line = inspect.getsourcelines(place)[1]
        except (OSError, TypeError):
            return ""
        config = get_config()
        path = place.__module__.replace(".", "/") + ".py"
        return f"[source]({config.git_url}/blob/{config.branch}/{path}#L{max(line, 1)})"

    def _repr_markdown_(self, docstring=False):
        rows = arguments(self.symbol)
        told = [r for r in rows if r.meaning]
        parts = [f"{'#' * self.level} {self.name}"]
        said = inspect.getdoc(self.symbol) if docstring else None
        line = " · ".join(p for p in (self.kind(), self.source()) if p)
        parts.append(f"[{line}]{{.api-source}}")
        parts += [prose(re.split(r"\n\s*\n", said)[0])] if said else []
        if told:
            parts.append(f"<details>\n<summary>arguments</summary>\n\n{table(rows)}\n\n</details>")
        return "\n\n".join(parts)

    def __repr__(self):
        return f"{self.name}: {', '.join(r.name for r in arguments(self.symbol))}"
