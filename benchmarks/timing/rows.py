"""A row of the results: one implementation of one case, or the reason why it was not timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.cases.registry import Case, Inputs


@dataclass
class Row:
    """One implementation of one case.

    seconds: median time of a call. spread: interquartile range over median.
    peak_bytes: GPU memory beyond the inputs.
    share_of_best: share of the nearer ceiling, the copy or the matrix product measured in the same run.
    ours_is_faster: this rival's time over that of ours just before it, the median over rounds.
    target_us, wanted_*: the goals, None where the case has none.
    """

    case: str
    implementation: str
    absent: str | None = None
    seconds: float = 0.0
    spread: float = 0.0
    rounds: int = 0
    bytes_per_second: float = 0.0
    flops_per_second: float = 0.0
    images_per_second: float = 0.0
    share_of_best: float = 0.0
    peak_bytes: int | None = None
    launches: int | None = None
    ours_is_faster: float | None = None
    target_us: float | None = None
    wanted_factor: float | None = None
    wanted_share: float | None = None
    wanted_peak: int | None = None
    wanted_launches: int | None = None
    shape: list[int] | None = None  # of the first input

    @classmethod
    def of(cls, case: Case, implementation: str, inputs: Inputs, **measured) -> Row:
        """The row of a case with its goals; measured: the other fields."""
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        return cls(
            case.name, implementation, target_us=case.target_us,
            wanted_factor=case.target_factors.get(implementation), wanted_share=case.target_share,
            wanted_peak=case.target_peak_bytes, wanted_launches=case.target_launches,
            shape=list(tensors[0].shape) if tensors else None, **measured,
        )  # fmt: skip

    def set_rates(self, moved: int, flops: int, images: int, best: dict[str, float]) -> None:
        self.bytes_per_second, self.flops_per_second = moved / self.seconds, flops / self.seconds
        self.images_per_second = images / self.seconds
        self.share_of_best = max(
            self.bytes_per_second / best["bytes_per_second"], self.flops_per_second / best["flops_per_second"]
        )

    def goals(self) -> list[tuple[str, bool]]:
        """(goal, whether it is met): for ours the absolute goals, for a rival the factor."""
        if self.absent is not None:
            return []
        if self.implementation != "ours":
            if self.wanted_factor is None or self.ours_is_faster is None:
                return []
            return [(f"{self.wanted_factor:g}x", self.ours_is_faster >= self.wanted_factor)]
        found = []
        if self.target_us is not None:
            found.append((f"{self.target_us:.4g} us", self.seconds * 1e6 <= self.target_us))
        if self.wanted_share is not None:
            found.append((f"{self.wanted_share:.0%} of best", self.share_of_best >= self.wanted_share))
        if self.wanted_peak is not None and self.peak_bytes is not None:
            found.append((f"{self.wanted_peak / 1e6:.0f} MB", self.peak_bytes <= self.wanted_peak))
        if self.wanted_launches is not None and self.launches is not None:
            wanted = self.wanted_launches
            found.append((f"{wanted} kernel{'s' * (wanted > 1)}", self.launches <= wanted))
        return found

    def to_json(self) -> dict:
        return asdict(self)


def number(value: int | Callable[[], int]) -> int:
    """The bytes or FLOPs of a case, which may be a function that computes them."""
    return value() if callable(value) else value


ROWS: list[Row] = []  # of this run


def read_run(path: Path) -> dict:
    """A file of pytest benchmarks/ --benchmark-json or of `jobs.session` -> machine, datetime, commit, dirty,
    rows and absent: dicts of Row, those of rows with the ceilings."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return _read_session(path, [json.loads(line) for line in text.splitlines()])
    run = json.loads(text)
    if "benchmarks" not in run or "dalle2_fast" not in run.get("machine_info", {}):
        raise ValueError(f"{path}: expected a file of pytest benchmarks/ --benchmark-json, got another")
    return dict(
        machine=run["machine_info"]["dalle2_fast"], datetime=run["datetime"], commit=run["commit_info"]["id"],
        dirty=run["commit_info"]["dirty"], rows=[one["extra_info"] for one in run["benchmarks"]],
        absent=run.get("dalle2_fast_absent", []),
    )  # fmt: skip


def _read_session(path: Path, lines: list[dict]) -> dict:
    """A later row replaces an earlier one of the same name; a figure is kept when a later run has none."""
    if not lines or "machine" not in lines[0]:
        raise ValueError(f"{path}: expected a file of benchmarks.jobs.session, got another")
    rows, absent = {}, {}
    for line in lines:
        if "machine" in line:
            about = line
            continue
        row = {name: value for name, value in line.items() if name != "stage"}
        key = row["case"], row["implementation"]
        if row["absent"] is None:
            rows[key] = row
            absent.pop(key, None)
        elif key not in rows:
            absent[key] = row
    return dict(
        machine=about["machine"], datetime=about["datetime"], commit=about["commit"].split()[0],
        dirty="local changes" in about["commit"], rows=list(rows.values()), absent=list(absent.values()),
    )  # fmt: skip
