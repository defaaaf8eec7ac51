"""Whether a command agrees with the run that it continues."""

from __future__ import annotations

from pathlib import Path

from dalle2_fast.data import Tokenizer, World
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder
from dalle2_fast.training.recipes import Preset
from dalle2_fast.training.run_folder import tokenizer as tokenizer_file
from dalle2_fast.training.run_folder.record import (
    ORDER,
    RunRecord,
    describe_shards,
    describe_tokenizer,
    differences,
    has_begun,
)
from dalle2_fast.training.weights import load_config

CLIP_GUIDED = ("prior", "decoder")  # the stages that learn from CLIP's embeddings

# A state can be continued with other data or another learning rate, but not from another beginning.
FIXED = ("--seed", "--init", "--prior", "--tokenizer")


def refuse(where: Path, found: dict[str, str], override: bool) -> None:
    """Raise a TrainingError that names what differs, unless `override` accepts it and it can be changed.

    Args:
        where: the run or the stage.
        found: see `record.differences`.
        override: whether the user has asked for the new values.
    """
    fixed = {name: text for name, text in found.items() if name in FIXED}
    if not found or (override and not fixed):
        return
    text = "; ".join(f"{name}: {text}" for name, text in (fixed if override else found).items())
    advice = "this cannot change within a run" if fixed else "--override takes the new value"
    raise TrainingError(f"{where}: cannot resume with other settings ({text}); {advice}")


def agree_on_run(
    record: RunRecord | None, preset: Preset, out: Path, shards: str | None, val_shards: str | None,
    override: bool,
) -> tuple[str | None, str | None]:  # fmt: skip
    """The shards for training and for validation: those of the run, if none are given.

    Raises:
        TrainingError: preset or data differ from the run's, and not `override`.
    """
    if record is None:
        on_shards = has_begun(out) and (Path(out) / tokenizer_file.FILE).exists()
        if on_shards and shards is None:
            raise TrainingError(
                f"--data: the run in {out} was trained on shards, but has no record of them (older release): "
                "expected --data"
            )
    else:
        _accept_order(record)
        given = {"preset": preset.name}
        if shards is not None:
            given["data"] = describe_shards(shards)
        elif record.run["data"] is None:
            given["world"] = World(**preset.world).to_config()
        if val_shards is not None:
            given["val_data"] = describe_shards(val_shards)
        recorded = {name: record.run.get(name) for name in given}
        refuse(Path(out), differences(recorded, given), override)
        if shards is None and record.run["data"] is not None:
            shards = record.run["data"]["shards"]
        if val_shards is None and record.run["val_data"] is not None:
            val_shards = record.run["val_data"]["shards"]
    if val_shards is not None and shards is None:
        raise ValueError("--val-data: is for a run on shards, expected --data")
    if shards is None and not preset.scenes:
        raise ValueError(f"--data: expected images with captions for the preset {preset.name}, got none")
    return shards, val_shards


def _accept_order(record: RunRecord) -> None:
    """Go on with a run whose samples came in another order, and say so."""
    for name in ("data", "val_data"):
        data = record.run[name]
        if data is not None and data.get("order") != ORDER:
            if name == "data":
                print(
                    "--data: another release began this run, with the samples in another order: a stage that "
                    "has begun goes on with other batches than without the interruption"
                )
            data["order"] = ORDER


def agree_on_data(
    record: RunRecord | None, preset: Preset, out: Path, shards: str | None, val_shards: str | None,
    tokenizer: Tokenizer, override: bool,
) -> dict:  # fmt: skip
    """What all stages share, for the record.

    Raises:
        TrainingError: the shards have changed since the run began, and not `override`; or the tokenizer has.
    """
    settings = {
        "preset": preset.name,
        "world": World(**preset.world).to_config() if shards is None else None,
        "data": describe_shards(shards),
        "val_data": describe_shards(val_shards),
        "tokenizer": describe_tokenizer(tokenizer),
    }
    if record is not None:
        names = ("data", "val_data", "tokenizer")
        recorded = {name: record.run.get(name) for name in names}
        refuse(Path(out), differences(recorded, {name: settings[name] for name in names}), override)
    return settings


def is_to_be_extended(
    folder: StageFolder, preset: Preset, length: dict, recorded: dict | None, override: bool
) -> bool:
    """Whether a finished stage is to be trained further, because it is to be longer than it is.

    Args:
        folder: of the stage.
        preset: has the recipe with the length.
        length: {"steps": N} or {"minutes": M}, of the recipe.
        recorded: the settings that the run has for the stage; None for a run that is older than records.
        override: whether the user has asked for other settings than the run's.

    Raises:
        TrainingError: it is to be longer, but without `override`, or its state is missing.
    """
    name, facts = folder.path.name, load_config(folder.weights_path)
    steps, minutes = facts.get("steps", 0), facts.get("minutes", 0.0)
    # A run that is older than records does not say whether its length was given or the preset's.
    is_same = facts["length"] == length if "length" in facts else "steps" not in length
    if is_same or preset.recipe(name).optimisation.progress(steps, 60.0 * minutes) >= 1.0:
        return False
    if not recorded and not override:
        raise TrainingError(
            f"{folder.path}: finished after {steps} steps, got --steps {length['steps']}: "
            "add --override to train it further"
        )
    if not folder.has_state():
        raise TrainingError(f"{folder.state_path} not found: {name} cannot be trained further without it")
    learners = [each for each in CLIP_GUIDED if StageFolder(folder.path.parent / each).has_begun()]
    if name == "clip" and learners:
        print(f"clip: is trained further; {' and '.join(learners)} learned from its earlier weights")
    return True
