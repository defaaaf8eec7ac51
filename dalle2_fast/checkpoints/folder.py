"""A checkpoint is a folder: `config.json` says what to build, `model.safetensors` holds the weights.

config.json holds `format_version` (raised when an older reader would misread the folder), `model` (the
class), the arguments of the model's constructor, and `weights_sha256`, the digest of the weights file: a
damaged byte, or a pair of files from two different saves, is found at loading and not seen in the images.

A save replaces two files and still switches at one instant. The new config also lies in the header of the new
weights file, and config.json announces the digest of that file (`successor_sha256`) before it takes the place
of the old one. At every instant a reader therefore knows which config belongs to the weights that it finds,
and a full disk or a kill leaves a whole checkpoint: the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dalle2_fast.checkpoints.atomic import atomic_write
from dalle2_fast.checkpoints.errors import CheckpointError, contents, damaged
from dalle2_fast.checkpoints.tensor_files import opened_safetensors, read_json

FORMAT_VERSION = 1
"""Version of the format of the folders that `save_folder` writes; older ones are read, newer ones refused."""
# version -> what turns a config of it into one of the next version. An option that is younger than a config
# needs no entry: the default of its class holds. Only what would be misread needs an entry, and a version.
MIGRATIONS: dict[int, Callable[[dict], dict]] = {}
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SUCCESSOR = "successor_sha256"  # in config.json while a save is under way, or after it was interrupted
_CONFIG = "an object with 'format_version', as dalle2_fast writes it"


def embedded_path() -> Path:
    """The folder of the checkpoint that is installed with the package.

    Returns:
        An absolute path.

    Example:
        >>> embedded_path().name
        'scenes'
    """
    return Path(__file__).resolve().parent.parent / "pretrained" / "scenes"


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read and check the `config.json` of a checkpoint folder, without its weights.

    Args:
        path: the folder.

    Returns:
        The config, in the current format version.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        CheckpointError: the file is damaged, or of a format that this version does not read.

    Example:
        >>> load_config(embedded_path())["model"]
        'DALLE2'
    """
    folder = _existing_folder(path)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(_missing_file(folder, CONFIG_FILE))
    config = _current_config(folder)
    if "format_version" not in config:
        raise CheckpointError(f"{file}: expected {_CONFIG}, got the keys {', '.join(config) or 'none'}")
    version = config["format_version"]
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        known = str(FORMAT_VERSION) if FORMAT_VERSION == 1 else f"1 to {FORMAT_VERSION}"
        later = "; it was written by a later one" if isinstance(version, int) and version > 1 else ""
        raise CheckpointError(
            f"{file}: unknown format_version {version!r}; this version of dalle2_fast reads {known}{later}"
        )
    for step in range(version, FORMAT_VERSION):
        config = MIGRATIONS[step](config) | {"format_version": step + 1}
    return config


def construct(make: Callable[[dict], Any], config: dict[str, Any], name: str, source: object) -> Any:
    """Build one part of a config.

    Args:
        make: what builds it from its dict.
        config: the config of a checkpoint.
        name: the key of the part.
        source: where the config was read; the error message begins with it.

    Returns:
        `make(config[name])`.

    Raises:
        CheckpointError: `config[name]` is no dict, or `make` does not accept it.

    Example:
        >>> construct(lambda sizes: sizes["width"], {"unet": {"width": 8}}, "unet", "runs/one")
        8
    """
    if not isinstance(config.get(name), dict):
        raise CheckpointError(
            f"{source}: {CONFIG_FILE}: {name}: expected an object, got {config.get(name)!r}"
        )
    try:
        return make(config[name])
    except Exception as error:  # torch and Python raise almost any exception for values of another kind
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{source}: {CONFIG_FILE}: {name}: cannot be built ({reason})") from error


def load_folder(
    path: str | os.PathLike, parts: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint folder.

    Args:
        path: the folder.
        parts: the parts of a DALLE2 whose tensors, called "<part>.<key>", are read. None reads all. The
            tensors of a single network are always all read.

    Returns:
        The config, and name -> tensor on the CPU, in the dtypes of the file.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        CheckpointError: a file is damaged, truncated, of an unknown format, or from another save than the
            other file.

    Example:
        >>> config, tensors = load_folder(embedded_path(), parts=["prior"])
        >>> {name.partition(".")[0] for name in tensors}
        {'prior'}
    """
    config = load_config(path)
    chosen = None if parts is None or config.get("model") != "DALLE2" else {*parts}
    folder = Path(path).expanduser()
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(_missing_file(folder, WEIGHTS_FILE))
    with opened_safetensors(file) as content:
        names = [x for x in content.keys() if chosen is None or x.partition(".")[0] in chosen]
        tensors = {name: content.get_tensor(name) for name in names}
    expected = config.get("weights_sha256")  # absent only in a config written by hand
    if expected is not None and (found := _sha256(file)) != expected:
        raise CheckpointError(
            f"{file}: damaged, or from another save than {CONFIG_FILE}: expected sha256 {expected[:16]}..., "
            f"got {found[:16]}..."
        )
    return config, tensors


def save_folder(
    path: str | os.PathLike,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a checkpoint folder; the checkpoint that it holds is replaced, its other files stay.

    An interruption at any time leaves the previous checkpoint or the new one (see above).

    Args:
        path: the folder; it is created if it does not exist.
        config: a JSON-able dict; `format_version` and `weights_sha256` are added.
        tensors: name -> tensor, on any device.
        dtype: floating-point tensors are stored in it (bfloat16 halves the file); None keeps theirs.

    Returns:
        The folder.

    Raises:
        OSError: a file cannot be written; the message names it.
        TypeError, ValueError: the config is not JSON-able. Nothing has been written.

    Example:
        >>> import tempfile
        >>> folder = save_folder(tempfile.mkdtemp(), {"model": "Toy"}, {"toy.weight": torch.ones(2)})
        >>> config, tensors = load_folder(folder)
        >>> config["model"], tensors["toy.weight"]
        ('Toy', tensor([1., 1.]))
    """
    folder = Path(path).expanduser()
    config = {"format_version": FORMAT_VERSION, **config}
    # A config that is not JSON-able must raise before anything is written.
    # One key, because safetensors writes several in a random order.
    metadata = {"config": json.dumps(config, ensure_ascii=False, allow_nan=False)}
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        # safetensors refuses tensors that share memory, so tied weights are stored twice.
        stored[name] = tensor.to("cpu", copy=True).contiguous()

    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(folder / WEIGHTS_FILE) as temporary:
            _write_safetensors(temporary, stored, metadata, folder / WEIGHTS_FILE)
            digest = _sha256(temporary)
            new = config | {"weights_sha256": digest}
            previous = _replaceable_config(folder)
            _write_json(folder / CONFIG_FILE, new if previous is None else previous | {SUCCESSOR: digest})
        # From here on the new checkpoint is the one that is loaded.
        if previous is not None:
            _write_json(folder / CONFIG_FILE, new)
    except BaseException:  # including KeyboardInterrupt
        if created and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return folder


def _current_config(folder: Path) -> dict[str, Any]:
    """The config that belongs to the weights in the folder, as this moment finds them."""
    config = read_json(folder / CONFIG_FILE, _CONFIG)
    successor, weights = config.pop(SUCCESSOR, None), folder / WEIGHTS_FILE
    if successor is not None and weights.is_file() and _sha256(weights) == successor:
        with opened_safetensors(weights) as content:
            try:
                return json.loads(content.metadata()["config"]) | {"weights_sha256": successor}
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise damaged(weights, f"no config in its header: {error!r}") from None
    return config


def _replaceable_config(folder: Path) -> dict[str, Any] | None:
    """The config of the checkpoint that a save replaces; None if there is none that could be loaded."""
    try:
        return _current_config(folder)
    except (FileNotFoundError, CheckpointError):
        return None


def _write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str], final: Path) -> None:
    file.touch()
    mode = file.stat().st_mode & 0o777
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{final}: cannot be written ({error})") from None
    file.chmod(mode)  # safetensors makes files that only their owner may read; here the umask decides


def _write_json(file: Path, config: dict[str, Any]) -> None:
    with atomic_write(file) as temporary:
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def _existing_folder(path: str | os.PathLike) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder == embedded_path():
        raise FileNotFoundError(
            f"{folder}: the embedded checkpoint is missing from this installation; "
            "install dalle2_fast again or name a checkpoint folder"
        )
    if folder.exists():
        raise FileNotFoundError(f"{folder}: expected a checkpoint folder with {CONFIG_FILE}, got a file")
    raise FileNotFoundError(f"{folder}: no such checkpoint folder")


def _missing_file(folder: Path, name: str) -> str:
    return (
        f"{folder}: not a dalle2_fast checkpoint: {name} is missing; expected {CONFIG_FILE} and "
        f"{WEIGHTS_FILE}, got {contents(folder)}"
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
