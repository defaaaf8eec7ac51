"""Plots of a result file: ours against each rival, the roofline, time and memory of the loss against N."""

from __future__ import annotations

import json
import re
from pathlib import Path


def save(figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


def plot(result: dict, stem: Path) -> list[Path]:
    """Bars (speed-up of ours over each rival), the roofline, and time and memory of the losses."""
    from matplotlib.figure import Figure

    def at(name: str) -> Path:
        return stem.with_name(f"{stem.name}-{name}.png")

    paths = []
    rivals = [row for row in result["rows"] if row["ours_is_faster"]]
    if rivals:
        figure = Figure(figsize=(9, 1 + 0.28 * len(rivals)))
        axes = figure.add_subplot()
        names = [f"{row['case']} / {row['implementation']}" for row in rivals]
        values = [row["ours_is_faster"] for row in rivals]
        axes.barh(names, values, color=["#2a7" if value >= 1 else "#c44" for value in values])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(xlabel="times faster than the rival", title=result["device"])
        paths.append(save(figure, at("rivals")))

    ours = [row for row in result["rows"] if row["implementation"] == "ours" and row["flops_per_second"]]
    if ours:
        figure = Figure(figsize=(7, 5))
        axes, best = figure.add_subplot(), result["ceilings"]
        intensity = [row["flops_per_second"] / row["bytes_per_second"] for row in ours]
        ends = [min(intensity) / 4, max(intensity) * 4]
        roof = [min(best["flops_per_second"], best["bytes_per_second"] * end) / 1e12 for end in ends]
        corner = best["flops_per_second"] / best["bytes_per_second"]
        if ends[0] < corner < ends[1]:
            ends, roof = [ends[0], corner, ends[1]], [roof[0], best["flops_per_second"] / 1e12, roof[1]]
        axes.plot(ends, roof, color="black", label="measured ceilings")
        for x, row in zip(intensity, ours, strict=True):
            axes.plot(x, row["flops_per_second"] / 1e12, "o")
            axes.annotate(row["case"], (x, row["flops_per_second"] / 1e12), fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s",
                 title=result["device"])  # fmt: skip
        axes.legend()
        paths.append(save(figure, at("roofline")))

    series: dict[str, list[tuple]] = {}
    for row in result["rows"]:
        found = re.match(r"contrastive loss, N = (\d+), D = 512$", row["case"])
        if found and row["peak_bytes"] is not None:
            point = int(found[1]), row["seconds"], row["peak_bytes"]
            series.setdefault(row["implementation"], []).append(point)
    if series:
        paths.append(save(against_n(series, result["device"]), at("loss")))
    return paths


def plot_memory(path: Path) -> list[Path]:
    """Time and memory from the file of contrastive_memory.py, if there is one. The time is in CPU seconds,
    which other load on the machine changes least."""
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    series: dict[str, list[tuple]] = {}
    for row in result["rows"]:
        for kind in ("fused", "reference", "open_clip"):
            if kind in row and row["loss"] == "contrastive_loss":
                point = row["N"], row[kind]["cpu_s"], row[kind]["extra_MB"] * 1e6
                label = f"{kind}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
                series.setdefault(label, []).append(point)
    width, cpu = result["rows"][0]["D"], result["machine"]["cpu"]
    title = f"contrastive loss, forward and backward, D = {width}, {cpu}"
    return [save(against_n(series, title, "CPU seconds"), path.with_suffix(".png"))]


def against_n(series: dict[str, list[tuple]], title: str, time: str = "seconds"):
    """Two panels of {implementation: [(N, seconds, bytes), ...]}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    figure.suptitle(title)
    for place, (label, unit) in enumerate(((time, 1.0), ("memory beyond the inputs, GB", 1e9)), 1):
        axes = figure.add_subplot(1, 2, place)
        for kind, points in series.items():
            points = sorted(points)
            values = [point[place] / unit for point in points]
            axes.plot([point[0] for point in points], values, "o-", label=kind)
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel=label)
        axes.legend(fontsize=7)
    return figure
