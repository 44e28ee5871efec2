"""A call trace: the package's modules whose functions run in a call, and how often a function is called in it."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType

import deit_models

PACKAGE = Path(deit_models.__file__).parent


def modules_run(act: Callable[[], object]) -> set[str]:
    """The modules, e.g. "hub.load", whose functions run in `act`, also in threads that it starts.

    Imports on the way do not count: neither the top level of a module nor the body of a class is a function.
    """
    # top levels of modules and bodies of classes are not optimised
    files = {code.co_filename for code in _calls(act) if code.co_flags & CO_OPTIMIZED}
    paths = (Path(file) for file in files)
    return {module_name(path) for path in paths if path.is_relative_to(PACKAGE)}


def calls_of(function: Callable[..., object], act: Callable[[], object]) -> int:
    """How often a Python function runs in `act`; for constructions of a class, give its `__init__`."""
    return _calls(act)[function.__code__]


def module_name(path: Path) -> str:
    """ "hub.load" for hub/load.py, "hub" for hub/__init__.py, "__init__" for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _calls(act: Callable[[], object]) -> Counter[CodeType]:
    counts: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            counts[frame.f_code] += 1

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return counts
