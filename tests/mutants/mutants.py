"""A list of small wrong changes to the library, and what must notice them.

`PART.toml` names the tests of a part, fast ones first, and the changes: in `file` (below
unpaired_kd/) the text `old`, which occurs once, or first after the text `within`, becomes `new`.
`same` says why a change is none.
"""

import ast
import dataclasses
import hashlib
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclasses.dataclass(frozen=True)
class Mutant:
    "One wrong change."

    part: str  # name of its list
    tests: tuple  # files of tests, in the order in which they are asked
    file: str  # module, below unpaired_kd/
    old: str  # what stands there
    new: str  # what is put in its place
    why: str  # what is wrong then
    within: str = ""  # `old` is looked for after this text
    same: str = ""  # why it changes nothing, if so

    @property
    def name(self):
        "What it is called in a report."
        return f"{self.part}: {self.why}"

    def applied(self, text):
        "The module's text with the change; ValueError if it does not fit."
        start = text.find(self.within) if self.within else 0
        if start < 0:
            raise ValueError(f"{self.file}: {self.within!r} is not there any more")
        head, tail = text[:start], text[start:]
        if self.within:
            found = self.old in tail
        else:
            found = tail.count(self.old) == 1
        if not found:
            times = tail.count(self.old)
            raise ValueError(f"{self.file}: {self.old!r} occurs {times} times, not once")
        changed = head + tail.replace(self.old, self.new, 1)
        if changed == text:
            raise ValueError(f"{self.file}: {self.old!r} is not changed")
        ast.parse(changed)
        return changed


def read_list(path):
    "The mutants of one list; ValueError names a list that is not understood."
    part = path.stem
    plain = tomllib.loads(path.read_text(encoding="utf-8"))
    tests = tuple(plain.get("tests", ()))
    if not tests or any(not (ROOT / t.split("::")[0]).exists() for t in tests):
        raise ValueError(f"{path.name}: `tests` must list files of tests that are there: {tests}")
    fields = {f.name for f in dataclasses.fields(Mutant)} - {"part", "tests"}
    for entry in plain["mutant"]:
        if strange := entry.keys() - fields:
            raise ValueError(f"{path.name}: {entry} has unknown keys {sorted(strange)}")
    return [Mutant(part=part, tests=tests, **entry) for entry in plain["mutant"]]


def read_lists(parts=(), folder=HERE):
    "All mutants of the parts, or of every list."
    known = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if wrong := set(parts) - known.keys():
        raise ValueError(f"no list {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    return [m for part in parts or known for m in read_list(known[part])]


def fingerprint(mutant, root=ROOT):
    "What an answer depends on: the change, its module and the tests that are asked."
    parts = [dataclasses.asdict(mutant), (root / "unpaired_kd" / mutant.file).read_bytes()]
    parts += [(root / test.split("::")[0]).read_bytes() for test in mutant.tests]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
