"""A checkpoint is a folder: `config.json` says what to build, `model.safetensors` holds the weights.

config.json carries `format_version` (raised when an older reader would misread the folder), `model` (the
class) and whatever the model's constructor needs; `weights_sha256` ties it to the weights file, so that a
damaged byte or a pair of files from two different saves is found when loading and not seen in the pictures.

Both files are written in full beside their place and only then renamed: a full disk or a kill leaves the
previous checkpoint as it was, and no half-written file under a valid name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading a config needs no torch
    import torch
    from torch import Tensor

FORMAT_VERSION = 1
# version -> what makes the config of the next one of it. Options that a config lacks, because they are
# younger than it, have the defaults of the classes; only what would be misread needs an entry, and a version.
MIGRATIONS: dict[int, Callable[[dict], dict]] = {}
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that exists but cannot be used; the message names the file and what is wrong with it."""


def embedded_path() -> Path:
    """The folder of the checkpoint that is installed with the package."""
    return Path(__file__).resolve().parent.parent / "pretrained" / "scenes"


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read and check `config.json` of the checkpoint folder `path`, without its weights.

    Raises FileNotFoundError if the folder or the file is missing, CheckpointError if it is not a checkpoint
    of a format that this version reads.
    """
    folder = _existing_folder(path)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(_missing_file(folder, CONFIG_FILE))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: damaged, not valid JSON ({error})") from None
    if not isinstance(config, dict) or "format_version" not in config:
        raise CheckpointError(f"{file}: expected an object with 'format_version', as dalle2_fast writes it")
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
    """`make(config[name])`; a CheckpointError that begins with `source` if that is not possible."""
    if not isinstance(config.get(name), dict):
        raise CheckpointError(
            f"{source}: {CONFIG_FILE}: {name}: expected an object, got {config.get(name)!r}"
        )
    try:
        return make(config[name])
    except (TypeError, ValueError, KeyError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{source}: {CONFIG_FILE}: {name}: cannot be built ({reason})") from error


def load_folder(
    path: str | os.PathLike, parts: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the checkpoint folder `path` -> (config, tensors on the CPU in the dtype of the file).

    parts: of a whole chain's tensors, "<part>.<key>", only those of these parts.
    Raises FileNotFoundError for a missing folder or file, CheckpointError for a damaged, truncated or unknown
    one.
    """
    from safetensors import SafetensorError, safe_open

    config = load_config(path)
    chosen = None if parts is None or config.get("model") != "DALLE2" else {*parts}
    folder = Path(path).expanduser()
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(_missing_file(folder, WEIGHTS_FILE))
    try:
        with safe_open(file, framework="pt") as content:
            names = [x for x in content.keys() if chosen is None or x.partition(".")[0] in chosen]
            tensors = {name: content.get_tensor(name) for name in names}
    except SafetensorError as error:  # the header disagrees with the file's length, or is no header at all
        size = file.stat().st_size
        raise CheckpointError(f"{file}: truncated or damaged ({size:,} bytes; {error})") from None
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
    """Write a checkpoint folder; an existing one is replaced, other files in it are left alone.

    `config`: JSON-able, without `format_version` and `weights_sha256`, which are added. `dtype`:
    floating-point tensors are converted to it (bfloat16 halves the file); None keeps each tensor's own.
    Returns the folder. Raises OSError if the folder cannot be written, ValueError/TypeError if `config` is
    not JSON.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(path).expanduser()
    config = {"format_version": FORMAT_VERSION, **config}
    json.dumps(config, allow_nan=False)  # a config that cannot be written is found before anything is
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        # safetensors refuses tensors that share memory; tied weights are simply stored twice
        stored[name] = tensor.to("cpu", copy=True).contiguous()

    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: folder / f".{name}.{os.getpid()}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        try:
            save_file(stored, beside[WEIGHTS_FILE], metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS_FILE}: cannot be written ({error})") from None
        config["weights_sha256"] = _sha256(beside[WEIGHTS_FILE])
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        beside[CONFIG_FILE].write_text(text, encoding="utf-8")
        # safetensors makes files that only their owner may read; a checkpoint gets what the umask says
        beside[WEIGHTS_FILE].chmod(beside[CONFIG_FILE].stat().st_mode & 0o777)
        for file in beside.values():
            _flush_to_disk(file)  # otherwise a power cut may keep the rename and lose the content
        for name, file in beside.items():
            os.replace(file, folder / name)
    except BaseException:  # Ctrl-C too
        for file in beside.values():
            file.unlink(missing_ok=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return folder


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
    present = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(present[:6]) + (", ..." if len(present) > 6 else "")
    return (
        f"{folder}: not a dalle2_fast checkpoint: {name} is missing; expected {CONFIG_FILE} and "
        f"{WEIGHTS_FILE}, got {shown or 'an empty folder'}"
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush_to_disk(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
