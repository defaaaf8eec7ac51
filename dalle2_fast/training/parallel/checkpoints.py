"""The states of many processes, in checkpoints/ of a stage's folder, by torch.distributed.checkpoint.

    step-000000120/         a whole state: every tensor once, divided over the files of the processes;
                            another one of the same step is step-000000120.1
        state.json          plain values: step, seconds, configuration, sums of the log
        .metadata, *.distcp what torch.distributed.checkpoint writes
    step-000000240.partial  a state that is being written; it is renamed when it is complete

Tensors have the names of the model's parameters, so that a state can be read by any number of processes, with
ddp or fsdp. A state is copied to the host's memory while the training stands still, and written while it goes
on.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from dalle2_fast.checkpoints.atomic import SUFFIX, flush_names
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import StageFolder, checkpoint_number, find_damage, reason, write_file
from dalle2_fast.training.optimisers import parameter_names
from dalle2_fast.training.parallel.processes import Processes
from dalle2_fast.training.parallel.shards import like_shard
from dalle2_fast.training.state import TrainingState

FACTS = "state.json"
TENSORS = ("model", "ema", "optimizers")  # entries of a state that are no plain values


class Checkpoints:
    """Saves and loads the states of a stage: state.pt of one process, checkpoints/ of many.

    Args:
        folder: of the stage.
        processes: of the training.
        keep: how many states of many processes are kept.
    """

    def __init__(self, folder: StageFolder, processes: Processes, keep: int = 2) -> None:
        self.folder, self.processes, self.keep = folder, processes, keep
        self._writing: tuple[Future, Path, dict] | None = None  # the temporary folder, and the plain values

    def save(self, state: TrainingState, *, wait: bool = False) -> None:
        """Save a state. That of many processes is written while the training goes on.

        Args:
            state: of this process.
            wait: return after it is complete.

        Raises:
            TrainingError: it, or the state before it, cannot be written. What was written of it is deleted.
        """
        if self.processes.world_size == 1:
            self.folder.save_state(state.state_dict())
            shutil.rmtree(self.folder.checkpoints_path, ignore_errors=True)  # they are older
            return
        self.finish()
        path = self.folder.checkpoints_path / f"{self.processes.from_first(self._name(state.step))}{SUFFIX}"
        saved = state.state_dict()
        facts = {name: value for name, value in saved.items() if name not in TENSORS}
        facts["window"] = {name: plain(value) for name, value in facts["window"].items()}
        facts["ema_updates"] = state.ema.updates
        with self._errors(path):
            writer = dcp.FileSystemWriter(path)
            future = dcp.async_save(
                tensors_of(state), storage_writer=writer, process_group=self.processes.writers
            )
        self._writing = future, path, facts
        if wait:
            self.finish()

    def _name(self, step: int) -> str:
        """The name of the next state of a step, which may have been saved before."""
        saved = map(checkpoint_number, self.folder.checkpoints())
        same = [number for other, number in saved if other == step]
        return f"step-{step:09d}" + (f".{max(same) + 1}" if same else "")

    def poll(self) -> None:
        """Complete a state that has been written. TrainingError if it could not be written."""
        if self._writing is not None and self._writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait until no state is being written. TrainingError if it could not be written."""
        if self._writing is None:
            return
        (future, path, facts), self._writing = self._writing, None
        with self._errors(path):
            future.result()
            if self.processes.is_first:  # its future is done after the files of all processes are
                write_file(path / FACTS, json.dumps(facts).encode())
                os.replace(path, complete(path))
                flush_names(path.parent)
                self._delete_older()

    def _delete_older(self) -> None:
        for path in self.folder.checkpoints()[self.keep :]:
            leaving = path.with_name(f"{path.name}{SUFFIX}")  # half of a state has no name of a state
            os.replace(path, leaving)
            shutil.rmtree(leaving)
        for path in (self.folder.state_path, self.folder.previous_path):  # they are older
            path.unlink(missing_ok=True)

    def _errors(self, path: Path):
        return _WriteErrors(path, self.processes)

    def load(self, state: TrainingState, *, fresh_optimizers: bool = False) -> None:
        """Continue from the newest state of any number of processes.

        Raises:
            TrainingError: it is damaged, or of another stage, seed, model or optimiser.
        """
        path = self.processes.from_first(self._newest())
        if path is None:
            saved, path = self.folder.load_state()
            saved = sharded(saved, state)
        else:
            saved = self._read(path, state)
        state.load_state_dict(saved, path, fresh_optimizers=fresh_optimizers)

    def _newest(self) -> Path | None:
        """The newest state of many processes; None if state.pt is newer, or the only one."""
        found = self.folder.checkpoints()
        if found and self.folder.state_path.exists():
            # One of the two was not deleted yet when a kill came.
            if self.folder.load_state()[0].get("step", -1) >= checkpoint_number(found[0])[0]:
                return None
        return found[0] if found else None

    def _read(self, path: Path, state: TrainingState) -> dict:
        try:
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
            state.check_origin(facts, path)
            reader = dcp.FileSystemReader(path)
            metadata, live = reader.read_metadata(), places_of(state)
            places = metadata.state_dict_metadata
            with self.processes.together():
                self._check(path, list(metadata.storage_data.values()))
            tensors = {name: place_for(name, entry, live) for name, entry in places.items()}
            alone = self.processes.world_size == 1
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(
                    tensors, storage_reader=reader, process_group=self.processes.control, no_dist=alone
                )
        except TrainingError:
            raise
        except (Exception, CheckpointException) as error:  # torch's is a BaseException
            text = reasons(error) or " ".join(str(error).split()) or type(error).__name__
            raise self._damaged(path, text[:300]) from error
        window = facts["window"]
        facts["window"] = window | {name: torch.tensor(window[name]) for name in ("loss", "norm")}
        groups: dict[str, dict] = {name: {} for name in TENSORS}
        for name, value in tensors.items():
            kind, rest = name.split("/", 1)
            groups[kind][rest] = value
        return facts | {
            "model": groups["model"],
            "ema": {"updates": facts["ema_updates"], "average": groups["ema"]},
            "optimizers": numbered(groups["optimizers"], state),
        }


    def _damaged(self, path: Path, what: str) -> TrainingError:
        advice = f"; delete {path} to resume the state before it" if self.folder.checkpoints()[1:] else ""
        return TrainingError(f"{path}: damaged training state ({what}){advice}")

    def _check(self, path: Path, entries: list) -> None:
        """Compare the checksums of the tensors, which torch does not; each process does it for some of them.

        Args:
            path: of the state.
            entries: where each tensor is: an archive of torch.save within a file.
        """
        entries.sort(key=lambda entry: (entry.relative_path, entry.offset))
        for entry in entries[self.processes.rank :: self.processes.world_size]:
            with open(path / entry.relative_path, "rb") as file:
                file.seek(entry.offset)
                damage = find_damage(io.BytesIO(file.read(entry.length)))
            if damage is not None:
                raise self._damaged(path, f"{entry.relative_path}: {damage}")


class _WriteErrors:
    """Turns an error of writing into a TrainingError, and deletes what was written."""

    def __init__(self, path: Path, processes: Processes) -> None:
        self.path, self.processes = path, processes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if error is None or not isinstance(error, (OSError, CheckpointException, RuntimeError)):
            return
        text = reasons(error)
        if text is None and not isinstance(error, TrainingError):  # no fault of the disk
            return
        if self.processes.is_first:
            shutil.rmtree(self.path, ignore_errors=True)
        raise TrainingError(f"cannot write {complete(self.path)}: {text or error}") from error


def reasons(error: BaseException) -> str | None:
    """What the operating system said on each process; None if it said nothing."""
    if isinstance(error, OSError):
        return reason(error)
    if isinstance(error, CheckpointException):
        found = {}
        for rank, (cause, _) in error.failures.items():
            first = cause.__cause__ or cause
            text = reason(first) if isinstance(first, OSError) else " ".join(str(first).split())
            found.setdefault(text or type(first).__name__, rank)
        return "; ".join(f"process {rank}: {text}" for text, rank in found.items())
    text = str(error)
    # torch's writer of files puts the error of the system into a RuntimeError.
    return " ".join(text.split())[:300] if "write" in text or "No space" in text else None


def complete(path: Path) -> Path:
    """The folder of a state that is complete, from that of one that is being written."""
    return path.with_name(path.name.removesuffix(SUFFIX))


def plain(value):
    return value.item() if isinstance(value, Tensor) else value


def tensors_of(state: TrainingState) -> dict[str, Tensor]:
    """All tensors of a state by name: model/NAME, ema/NAME, optimizers/NAME/KEY."""
    found = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    found |= {f"ema/{name}": value for name, value in state.ema.average.items()}
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    for optimizer in state.optimizers:
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                found[f"optimizers/{names[id(parameter)]}/{key}"] = value
    return found


def places_of(state: TrainingState) -> dict[str, Tensor]:
    """Where the tensors of a state are read to: the model's and the average's, and for the optimisers the
    parameters, as which new tensors are divided."""
    found = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    found |= {f"ema/{name}": value for name, value in state.ema.average.items()}
    return found | {f"optimizers/{name}": value for name, value in state.model.named_parameters()}


def place_for(name: str, entry, live: dict[str, Tensor]) -> Tensor:
    """An empty tensor, or that of the state, into which the saved tensor `name` is read."""
    if name in live:
        return live[name]
    parameter = live.get(name.rpartition("/")[0])
    if parameter is not None and parameter.shape == entry.size:
        return torch.zeros_like(parameter, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def numbered(by_name: dict[str, Tensor], state: TrainingState) -> list[dict]:
    """The states of the optimisers, which number their parameters, from tensors by NAME/KEY."""
    entries: dict[str, dict] = {}
    for name, value in by_name.items():
        parameter, _, key = name.rpartition("/")
        entries.setdefault(parameter, {})[key] = value
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    found = []
    for optimizer in state.optimizers:
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        states = {index: entries[name] for index, name in enumerate(order) if name in entries}
        found.append({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return found


def sharded(saved: dict, state: TrainingState) -> dict:
    """The state of one process (state.pt) as these processes divide it; unchanged without shards."""
    live = state.model.state_dict()
    if not any(isinstance(value, DTensor) for value in live.values()):
        return saved
    try:
        order = parameter_names(state.model, state.options)
        by_name = {
            f"{name}/{key}": like_shard(value, live[name]) if value.shape == live[name].shape else value
            for names, optimizer in zip(order, saved["optimizers"], strict=True)
            for index, name in enumerate(names)
            for key, value in optimizer["state"].get(index, {}).items()
        }
        divided = {
            "model": {name: like_shard(value, live[name]) for name, value in saved["model"].items()},
            "ema": saved["ema"] | {"average": {name: like_shard(value, live[name])
                                               for name, value in saved["ema"]["average"].items()}},
            "optimizers": numbered(by_name, state),
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError):
        return saved  # `TrainingState.load_state_dict` says what is wrong with it
    return saved | divided
