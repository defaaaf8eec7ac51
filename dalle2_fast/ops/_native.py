"""Whether the native module `dalle2_fast._C` (csrc/) is installed, and how it was built."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def _why_absent() -> str | None:
    if importlib.util.find_spec("dalle2_fast._C") is not None:
        return None
    # Python searches the current folder first, so a checkout there hides an installed package.
    folders = [str(Path(entry or ".").resolve() / "dalle2_fast") for entry in sys.path]
    found = PathFinder.find_spec("dalle2_fast._C", folders)
    if found is not None and found.origin is not None:
        here, there = Path(__file__).parent.parent, Path(found.origin).parent
        return (
            f"the sources in {here} hide the installed package in {there}, which has the native module "
            "dalle2_fast._C: run from another folder, or `pip install -e .` in the sources"
        )
    return "the native module dalle2_fast._C was not built: `pip install -v -e .` in the sources says why"


WHY_ABSENT = _why_absent()  # None if dalle2_fast._C is installed; a constant, because torch.compile reads it


def describe() -> tuple[dict[str, object] | None, str | None]:
    """(how dalle2_fast._C was built, as a JSON-able dict, None), or (None, why it is not usable).

    Keys: `compiler`, `cuda` (version of nvcc, or None), `why_no_cuda` (or None) and `targets`: the GPUs for
    which each CUDA file was compiled. "90a" means compute capability 9.0 only, "80" means 8.0 to 8.9,
    "80+PTX" means 8.0 and all newer ones.
    """
    if WHY_ABSENT is not None:
        return None, WHY_ABSENT
    try:
        from dalle2_fast import _C
    except ImportError as error:
        return None, f"the native module dalle2_fast._C does not load: {error}"
    return _C.build_info(), None
