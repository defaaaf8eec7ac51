"""run.json: what defines the training of a run, so that `--resume` goes on with it.

    {"format_version": 1,
     "run": what all stages share: preset, world, data, val_data, tokenizer,
     "stages": {name: what defines the stage: seed, dtype, freeze, init, data options, optimisation}}

A stage is recorded when its command starts; `train all` records all stages, so that those that have not begun
go on with its options, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dalle2_fast.data import Tokenizer
from dalle2_fast.data.order import VERSION as ORDER
from dalle2_fast.data.sources import data_files
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, reason, write_file
from dalle2_fast.training.recipes import EXTRA_STAGES, STAGES, Preset, Recipe

FILE = "run.json"
FORMAT_VERSION = 1

# These fields of an Optimisation change no weight: a resumed run may log, validate and save more often.
HOUSEKEEPING = {"log_steps", "save_minutes", "save_steps", "first_validation", "validation_minutes"}

STAGE_SETTINGS = ("seed", "dtype", "freeze", "init", "length", "data_options")  # and those of Optimisation
RUN_SETTINGS = ("preset", "world", "data", "val_data", "tokenizer")

# The names of the settings that have an option, as the user writes them.
OPTIONS = {
    "preset": "--preset", "data": "--data", "val_data": "--val-data", "tokenizer": "--tokenizer",
    "seed": "--seed", "dtype": "--dtype", "freeze": "--freeze", "init": "--init",
    "embeddings": "--embeddings", "prior": "--prior",
    "batch_size": "--batch-size", "learning_rate": "--lr", "length": "--steps, --minutes",
}  # fmt: skip


@dataclass
class RunRecord:
    """What defines a run.

    Args:
        run: settings that all stages share.
        stages: settings of each stage.
    """

    run: dict = field(default_factory=dict)
    stages: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path, *, resume: bool) -> RunRecord | None:
        """The record of the run in `out`. None if it has none: it is new, or an older release's.

        Args:
            out: folder of the run.
            resume: also read the record of a run that was killed before its first state. A new run replaces
                it.

        Raises:
            TrainingError: the file cannot be read, or is no such record.
        """
        path = Path(out) / FILE
        if not path.exists() or not (resume or has_begun(out)):
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version == FORMAT_VERSION:
                run = {key: content["run"][key] for key in RUN_SETTINGS}
                stages = {name: dict(each) for name, each in content["stages"].items()}
                missing = [key for each in stages.values() for key in STAGE_SETTINGS if key not in each]
                if missing:
                    raise KeyError(missing[0])
                return cls(run, stages)
        except OSError as error:
            raise TrainingError(f"{path}: cannot be read: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TrainingError(f"{path}: damaged record of the run ({type(error).__name__})") from error
        raise TrainingError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}")

    def write(self, out: Path) -> None:
        """Replace out/run.json. TrainingError if it cannot be written."""
        content = {"format_version": FORMAT_VERSION, "run": self.run, "stages": self.stages}
        write_file(Path(out) / FILE, json.dumps(content, indent=1).encode())


def has_begun(out: Path) -> bool:
    """Whether a stage of the run in `out` has a state or weights."""
    folders = [StageFolder(Path(out) / name) for name in (*STAGES, *EXTRA_STAGES)]
    return any(folder.has_state() or folder.weights_path.exists() for folder in folders)


def stage_settings(
    name: str, preset: Preset, *, seed: int, dtype: torch.dtype, freeze: tuple[str, ...], init: Path | None,
    embeddings: Path | None = None,
) -> dict:  # fmt: skip
    """What defines the training of stage `name`, as plain JSON values.

    Args:
        name: of the stage.
        preset: has its recipe.
        seed: of weights, data and noise.
        dtype: of autocast.
        freeze: prefixes of the weights that are not trained.
        init: file of the weights it starts from.
        embeddings: folder of precomputed embeddings, whose rounding changes the weights; recorded only if it
            is given, because runs of older releases have none.
    """
    recipe: Recipe = preset.recipe(name)
    optimisation = dataclasses.asdict(recipe.optimisation)
    steps, minutes = optimisation.pop("steps"), optimisation.pop("minutes")
    length = {"minutes": minutes} if steps is None else {"steps": steps}
    prior = {"prior": preset.prior_kind} if name == "prior" else {}
    settings = {
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "freeze": sorted(freeze),
        "init": None if init is None else os.path.abspath(init),
        **prior,
        "length": length,
        **{key: value for key, value in optimisation.items() if key not in HOUSEKEEPING},
        "data_options": recipe.data,
        **({} if embeddings is None else {"embeddings": os.path.abspath(embeddings)}),
    }
    return json.loads(json.dumps(settings))  # tuples become lists, as in the file


def describe_shards(shards: str | None) -> dict | None:
    """The data of a run: where they are as an absolute path, the number of files, a hash of names and sizes,
    and the version of the order of their samples.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no kind of data that is read here.
        ImportError: a library that reads them is not installed.
    """
    if shards is None:
        return None
    is_local = "://" not in shards and not shards.startswith("pipe:")
    pattern = os.path.abspath(shards) if is_local else shards
    names = data_files(pattern)
    sizes = [os.path.getsize(name) if os.path.exists(name) else None for name in names]
    digest = hashlib.sha256(json.dumps([names, sizes]).encode()).hexdigest()
    return {"shards": pattern, "files": len(names), "sha256": digest, "order": ORDER}


def describe_tokenizer(tokenizer: Tokenizer) -> dict:
    """The kind of a tokenizer and the hash of its configuration."""
    config = tokenizer.to_config()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {"kind": type(tokenizer).__name__, "sha256": digest}


def differences(recorded: dict, given: dict) -> dict[str, str]:
    """What differs between two settings, by its option (or name): "the run has ..., got ..."."""
    found = {}
    for name in [*recorded, *(name for name in given if name not in recorded)]:
        before, now = recorded.get(name), given.get(name)
        if before != now:
            found[OPTIONS.get(name, name)] = f"the run has {shown(before)}, got {shown(now)}"
    return found


def shown(value: object) -> str:
    """A setting as text."""
    if value is None:
        return "none"
    if isinstance(value, dict) and "shards" in value:
        return f"{value['shards']} ({value['files']} files, {value['sha256'][:8]})"
    if isinstance(value, dict) and "kind" in value:
        return f"{value['kind']} {value['sha256'][:8]}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" if key not in ("steps", "minutes") else f"{each:g} {key}"
                         for key, each in value.items())  # fmt: skip
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def with_recorded(preset: Preset, record: RunRecord | None, given: set[str]) -> Preset:
    """The preset with the recorded values of every setting that was not given.

    Args:
        preset: already has the given values.
        record: of the run; None returns the preset unchanged, like one of another preset or prior.
        given: fields of Optimisation that the user has set: batch_size, learning_rate, steps, minutes.
    """
    if record is None or record.run.get("preset") != preset.name:
        return preset
    known = {each.name for each in dataclasses.fields(preset.clip.optimisation)} - given
    changed = {}
    for name, settings in record.stages.items():
        recipe = getattr(preset, name, None)
        if recipe is None or settings.get("prior", preset.prior_kind) != preset.prior_kind:
            continue
        length = {} if given & {"steps", "minutes"} else {"steps": None} | settings["length"]
        values = {key: value for key, value in settings.items() if key in known} | length
        if "betas" in values:
            values["betas"] = tuple(values["betas"])
        optimisation = dataclasses.replace(recipe.optimisation, **values)
        changed[name] = dataclasses.replace(
            recipe, optimisation=optimisation, data=settings["data_options"]
        )
    return dataclasses.replace(preset, **changed)
