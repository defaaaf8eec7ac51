"""A result file as Markdown: the table of all its rows, and the summary for the README."""

from __future__ import annotations


def table(result: dict) -> str:
    """All rows. Rows in which ours is slower are shown like the others."""
    heads = ("case", "implementation", "us", "spread", "GB/s", "GFLOP/s", "images/s", "of ceiling",
             "peak MB", "speed-up of ours", "goal")  # fmt: skip
    lines = [
        f"# {title(result)}",
        "",
        f"{about(result)} `spread`: interquartile range over median. `of ceiling`: share of the nearer of "
        "copy and matrix product. `speed-up of ours`: this rival's time over that of ours, the median over "
        "rounds, before each of which ours ran.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for row in result["rows"]:
        ours = row["implementation"] == "ours"
        goals = ", ".join(f"{wanted} {'yes' if met else '**no**'}" for wanted, met in row["goals"])
        cells = (
            row["case"],
            f"**{row['implementation']}**" if ours else row["implementation"],
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['spread']:.0%}",
            f"{row['bytes_per_second'] / 1e9:.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}" if row["flops_per_second"] else "",
            f"{row['images_per_second']:.3g}" if row["images_per_second"] else "",
            f"{row['share_of_best']:.0%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            "" if row["ours_is_faster"] is None else f"{row['ours_is_faster']:.2f}x",
            goals,
        )
        lines.append(f"| {' | '.join(cells)} |")
    if result["absent"]:
        lines += ["", "Not timed:", ""]
        reasons: dict[str, list[str]] = {}
        for row in result["absent"]:
            reasons.setdefault(row["why"], []).append(f"{row['case']} / {row['implementation']}")
        lines += [f"- {why}: {'; '.join(names)}" for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def title(result: dict) -> str:
    return f"{result['device']}, {result['date']}, commit {result['commit']}"


def about(result: dict) -> str:
    best, note = result["ceilings"], result["machine"].get("note")
    text = (
        f"Measured in the same run: copy {best['bytes_per_second'] / 1e9:.0f} GB/s, matrix product "
        f"{best['flops_per_second'] / 1e9:.0f} GFLOP/s."
    )
    return f"{text} {note.rstrip('.')}." if note else text


def summary(results: list[tuple[str, dict]], folder: str) -> str:
    """Per device a line for every case, ours against every rival.

    folder: of the results, relative to the file of the summary.
    """
    lines = []
    for name, result in results:
        lines += [
            f"**{title(result)}.** {about(result)} All rows: `{folder}/{name}.md`.",
            "",
            "| case | ours, ms | images/s | time of rivals / ours, side by side |",
            "|---|---|---|---|",
        ]
        for row in result["rows"]:
            if row["implementation"] != "ours":
                continue
            rivals = [other for other in result["rows"]
                      if other["case"] == row["case"] and other["ours_is_faster"] is not None]  # fmt: skip
            versus = ", ".join(f"{one['implementation']} {one['ours_is_faster']:.2f}" for one in rivals)
            rate = f"{row['images_per_second']:.3g}" if row["images_per_second"] else ""
            lines.append(f"| {row['case']} | {milliseconds(row['seconds'])} | {rate} | {versus} |")
        lines.append("")
        plots = [f"[{kind}]({folder}/{name}-{kind}.png)" for kind in result["plots"]]
        if plots:
            lines += [f"Plots: {', '.join(plots)}.", ""]
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Three significant digits, without an exponent."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
