"Teach a small network with images of another modality that were never paired with its own."
__version__ = "0.1.0"

from typing import TYPE_CHECKING

if TYPE_CHECKING: # for type checkers; Python imports each when it is asked for
    from .data.collections import Collection
    from .inference.student import Student
    from .study.run import run_study

HOMES = {"Collection": "data.collections", "Student": "inference.student", "run_study": "study.run"}
__all__ = ["Collection", "Student", "run_study"]


def __getattr__(name):
    "Import what is offered here when it is asked for, so that `import unpaired_kd` costs nothing."
    from importlib import import_module
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    from difflib import get_close_matches
    near = get_close_matches(name, __dir__(), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It offers {', '.join(__all__)}."
    raise AttributeError(f"{__name__} has no {name!r}. {hint}", name=name)


def __dir__():
    "The names of the module, with those that are not imported yet."
    return sorted({*globals(), *HOMES})
