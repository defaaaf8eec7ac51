"""CheckpointError, and the phrases that the messages about checkpoints share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that exists but cannot be used; the message names the file and what is wrong with it.

    Example:
        >>> isinstance(CheckpointError("model.safetensors: truncated"), ValueError)
        True
    """


def listed(names: Collection[str], limit: int = 5) -> str:
    """How many names there are, and the first few of them.

    Example:
        >>> listed(["a.weight", "a.bias", "b.weight"], limit=2)
        '3 (a.weight, a.bias and 1 more)'
    """
    shown = ", ".join([*names][:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} ({shown}{more})"


def contents(folder: Path, limit: int = 6) -> str:
    """The first names in a folder, for a message that says what came instead of a checkpoint.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "loop.json").symlink_to("loop.json")
        >>> (folder / "prior").mkdir()
        >>> contents(folder)
        'loop.json (a link to nothing), prior/'
    """
    names = []
    for entry in sorted(folder.iterdir())[:limit]:
        kind = "/" if entry.is_dir() else "" if entry.exists() else " (a link to nothing)"
        names.append(entry.name + kind)
    more = ", ..." if len(list(folder.iterdir())) > limit else ""
    return ", ".join(names) + more or "an empty folder"


def unreadable(path: Path, problem: str) -> CheckpointError:
    """The error about a file that cannot be read: what else it is, if its first bytes show that.

    Args:
        path: the file.
        problem: what the message says of any other file.

    Example:
        >>> import tempfile
        >>> page = Path(tempfile.mkdtemp()) / "clip.pt"
        >>> _ = page.write_text("<html>")
        >>> str(unreadable(page, "no zip file")).removeprefix(str(page))
        ': an HTML page, which was saved in the place of a checkpoint'
    """
    with open(path, "rb") as file:
        begin = file.read(512)
    if begin.startswith(b"version https://git-lfs"):
        problem = "a pointer of Git LFS; `git lfs pull` fetches the file itself"
    elif begin.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        problem = "an HTML page, which was saved in the place of a checkpoint"
    return CheckpointError(f"{path}: {problem}")


def damaged(path: Path, reason: object) -> CheckpointError:
    """The error about a file whose content is not as its kind demands.

    Args:
        path: the file.
        reason: what failed; its first line counts.
    """
    reason = str(reason).partition("\n")[0][:200]
    return unreadable(path, f"truncated or damaged ({path.stat().st_size:,} bytes; {reason})")


def mismatches(expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps the tensors `found` from taking the place of those expected; empty if nothing does.

    Args:
        expected: name -> a tensor of the right shape, on any device, or None where any shape will do.
        found: name -> tensor; integers do not take the place of floating-point numbers.

    Returns:
        At most one phrase for the missing names, one for those left over, three for wrong shapes or dtypes.

    Example:
        >>> import torch
        >>> mismatches({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, {"weight": torch.zeros(3, 2)})
        ['missing 1 (bias)', 'weight: expected [2, 3], got [3, 2]']
    """
    problems, wrong = [], []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing {listed(missing)}")
    if leftover := [name for name in found if name not in expected]:
        problems.append(f"left over {listed(leftover)}")
    for name, tensor in expected.items():
        if tensor is None or name not in found:
            continue
        came = found[name]
        if tensor.shape != came.shape:
            wrong.append(f"{name}: expected {list(tensor.shape)}, got {list(came.shape)}")
        elif tensor.is_floating_point() and not came.is_floating_point():
            wrong.append(f"{name}: expected floating-point numbers, got {came.dtype}")
    return problems + wrong[:3]
