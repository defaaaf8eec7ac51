"""Is the native module `dalle2_fast._C` (csrc/) here, and what is in it?"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def _why_absent() -> str | None:
    if importlib.util.find_spec("dalle2_fast._C") is not None:
        return None
    # Python looks into the current folder first: a checkout there hides an installed package.
    places = [str(Path(entry or ".").resolve() / "dalle2_fast") for entry in sys.path]
    found = PathFinder.find_spec("dalle2_fast._C", places)
    if found is not None and found.origin is not None:
        here, there = Path(__file__).parent.parent, Path(found.origin).parent
        return (
            f"the sources in {here} hide the installed package in {there}, which has the native module "
            "dalle2_fast._C: run from another folder, or `pip install -e .` in the sources"
        )
    return "the native module dalle2_fast._C was not built: `pip install -v -e .` in the sources says why"


WHY_ABSENT = _why_absent()  # why dalle2_fast._C is not here, or None: a constant for torch.compile


def describe() -> tuple[dict[str, object] | None, str | None]:
    """How dalle2_fast._C was built, as a JSON-able dict, and None; or None and why it is not usable.

    Keys: `compiler`, `cuda` (nvcc's version, or None), `why_no_cuda` (or None) and `targets`: the GPUs that
    each CUDA file is for. "90a" is compute capability 9.0 alone, "80" 8.0 to 8.9, "80+PTX" 8.0 and all newer.
    """
    if WHY_ABSENT is not None:
        return None, WHY_ABSENT
    try:
        from dalle2_fast import _C
    except ImportError as error:
        return None, f"the native module dalle2_fast._C does not load: {error}"
    return _C.build_info(), None
