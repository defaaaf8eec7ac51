"""Checkpoints of the Hugging Face hub, by their id ("kakaobrain/karlo-v1-alpha"), through huggingface_hub.

Cache, offline mode (HF_HUB_OFFLINE=1), mirrors and log-in are those of that package. What lies in the cache
is not fetched again.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from glob import escape
from pathlib import Path, PurePosixPath

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INSTALL = "install huggingface_hub (pip install 'dalle2-fast[hub]')"
_SMALL = (".json", ".txt")  # configurations and vocabularies
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".th")  # the first is preferred


def locate(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder or file of a checkpoint.

    Args:
        path: a path, or an id of the hub. "owner/name" is an id if neither this path nor a folder "owner"
            exists here.
        revision: a branch, tag or commit, for an id of the hub.

    Returns:
        The path itself, or a folder in the cache of the hub, into which it is fetched if it is not there.

    Raises:
        FileNotFoundError: the hub, its cache or the package huggingface_hub does not have it; the message
            says what was tried.
        ValueError: a revision was given for a local path.

    Example:
        >>> import tempfile
        >>> locate(tempfile.gettempdir()).is_dir()
        True
    """
    local, name = Path(path).expanduser(), os.fspath(path)
    if local.exists() or not _ID.fullmatch(name) or local.parent.is_dir():
        if revision is not None:
            raise ValueError(f"revision: expected None for a local path ({local}), got {revision!r}")
        return local
    return fetch(name, revision)


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a repository in the cache of the hub; what is missing there is fetched.

    Args:
        repo_id: "owner/name".
        revision: a branch, tag or commit; None takes the default branch.

    Raises:
        FileNotFoundError: the repository cannot be fetched and is not in the cache; the message says why.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"{repo_id}: no such checkpoint folder; to fetch it from the Hugging Face hub, {_INSTALL}"
        ) from None
    try:
        names = files_to_fetch(HfApi().list_repo_files(repo_id, revision=revision))
        patterns = [escape(name) for name in names]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise FileNotFoundError(
            f"{repo_id}: the Hugging Face hub gives it only to those who are logged in and have accepted its "
            "conditions (hf auth login)"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = "such revision" if isinstance(error, RevisionNotFoundError) else "such checkpoint"
        raise FileNotFoundError(
            f"{repo_id}: no such checkpoint folder, and the Hugging Face hub has no {what}"
            + (f" {revision!r}" if revision is not None else "")
        ) from None
    except Exception as error:  # offline mode, no network, no answer: each raises another class
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception as error:
        raise FileNotFoundError(
            f"{repo_id}: no such checkpoint folder, not in the Hugging Face hub's cache, and not fetched "
            f"({reason})"
        ) from error


def files_to_fetch(names: Iterable[str]) -> list[str]:
    """The files of a repository that a checkpoint needs.

    Args:
        names: all files of the repository.

    Returns:
        All configurations, and in each folder the weights of one kind: safetensors rather than pickles, full
        precision rather than variants such as ".fp16".

    Example:
        >>> files_to_fetch(["prior/config.json", "prior/x.bin", "prior/x.safetensors", "README.md"])
        ['prior/config.json', 'prior/x.safetensors']
    """
    chosen, weights = [], defaultdict(list)
    for name in names:
        path = PurePosixPath(name)
        if path.suffix in _WEIGHTS:
            weights[path.parent].append(path)
        elif path.suffix in _SMALL:
            chosen.append(name)
    for paths in weights.values():
        plain = [path for path in paths if _variant(path) is None] or paths
        # In a folder of Karlo's original files, the kinds belong together. In a folder of diffusers or
        # transformers, each kind holds the same weights.
        best = min(_WEIGHTS.index(path.suffix) for path in plain)
        originals = [path for path in plain if path.suffix in _WEIGHTS[2:]]
        kept = plain if originals and best >= 2 else [
            path for path in plain if path.suffix == _WEIGHTS[best]]
        chosen += map(str, kept)
    return sorted(chosen)


def _variant(path: PurePosixPath) -> str | None:
    """The variant in a file name: "fp16" in x.fp16.safetensors and in x.fp16-00001-of-00002.safetensors."""
    found = re.fullmatch(r".*\.([A-Za-z_]\w*)(-\d+-of-\d+)?", path.stem)
    return found[1] if found else None
