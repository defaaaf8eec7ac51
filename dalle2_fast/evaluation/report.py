"""The report of `dalle2-fast evaluate` as a table."""

from __future__ import annotations

COLUMNS = ("generated", "renders", "shuffled", "nearest")
KIND_TITLES = {"one": "one object", "two": "two objects", "count": "2 to 5 alike", "three": "three objects"}


def print_report(report: dict) -> None:
    """Print what `evaluation.measure.evaluate` returned, with an entry "checkpoint"."""
    splits, sampling = report["splits"], report["sampling"]
    print(f"checkpoint {report['checkpoint']}, seed {report['seed']}, {report['device']} {report['dtype']}")
    if report["clip"]:
        print(f"\nCLIP, right of {report['clip_captions']} images, %")
        _print_rows(_clip_rows(report["clip"], splits), [(split, "") for split in splits])
        print(
            f"retrieval: is the nearest of {report['clip_captions']} captions true of the image? "
            "two-way: is the true caption\nnearer than its edited copy? Chance is 50. "
            "binding: colours or shapes exchanged."
        )
    if report["caption_accuracy"]:
        settings = ", ".join(
            f"{name} {value}" for name, value in sampling.items() if not name.startswith("upsampler")
        )
        print(f"\nCaptions read back from {report['captions']} images of {report['size']} px per split, %")
        heads = [(split, title) for split in splits for title in COLUMNS]
        _print_rows(_caption_rows(report["caption_accuracy"], splits), heads)
        print(
            "generated: by this checkpoint. renders: the true images; this is how well the reader reads. "
            "shuffled: generated\nfrom other captions. nearest: the render of the most similar of "
            f"{report['training_captions']} training captions.\n{settings}"
        )
    if report["upsampler"]:
        scores = report["upsampler"]
        print(
            f"\nupsampler: PSNR {scores['psnr']:.2f} dB, bicubic {scores['psnr_bicubic']:.2f} dB "
            f"({scores['pictures']} images, compared with their large renders)"
        )
    if report["outline_scores"]:
        scores = report["outline_scores"]
        print(f"\nOutlines of one large object: IoU with the ideal shape, {scores['captions']} images")
        _print_outlines(scores["generated"], scores["renders"])
    if report["denoising"]:
        values, number = report["denoising"]["psnr"], report["denoising"]["pictures"]
        print(f"\nDenoising: PSNR of the decoder's x0 from {number} true images with noise")
        print("log-SNR" + "".join(f"{name:>8}" for name in values))
        print("dB     " + "".join(f"{value:8.2f}" for value in values.values()))
        if (found := report["denoising"]["outline_iou"]) is not None:
            title = f"IoU    {''.join(f'{value:8.3f}' for value in found.values())}"
            print(f"{title}   (outlines of {report['denoising']['outlines']} large objects)")
    print(f"\nseconds: {', '.join(f'{name} {value}' for name, value in report['seconds'].items())}")


def _clip_rows(clip: dict, splits: list[str]) -> dict[str, list[dict | None]]:
    rows = {}
    for test, title in (("retrieval", "retrieval"), ("two_way", "two-way")):
        names = dict.fromkeys(name for split in splits for name in clip[split][test])
        for name in names:
            rows[f"{title} {name.replace('_', ' ')}"] = [clip[split][test].get(name) for split in splits]
    return rows


def _caption_rows(accuracy: dict, splits: list[str]) -> dict[str, list[dict | None]]:
    rows = {}
    for kind, title in KIND_TITLES.items():
        names = dict.fromkeys(name for split in splits for name in accuracy[split]["renders"].get(kind, {}))
        for name in names:
            rows[f"{title}: {name}"] = [
                accuracy[split][source].get(kind, {}).get(name) for split in splits for source in COLUMNS
            ]
    return rows


def _print_outlines(generated: dict, renders: dict) -> None:
    print(f"{'':12}{'generated':>10}{'renders':>10}")
    rows = {shape: (value, renders["by_shape"][shape]) for shape, value in generated["by_shape"].items()}
    rows |= {name: (generated[name], renders[name]) for name in ("mean", "worst")}
    for name, (value, ceiling) in rows.items():
        print(f"{name:12}{value:10.3f}{ceiling:10.3f}")


def _print_rows(rows: dict[str, list[dict | None]], heads: list[tuple[str, str]]) -> None:
    """One line per row: its name, a rate in % per column, and the number of cases (all, if they differ)."""
    width = max(map(len, rows)) + 2
    splits = "".join(
        f"{head[0] if index == 0 or heads[index - 1][0] != head[0] else '':>10}"
        for index, head in enumerate(heads)
    )
    print(f"{'':{width}}{splits}")
    if any(title for _, title in heads):
        print(f"{'':{width}}" + "".join(f"{title:>10}" for _, title in heads))
    for name, cells in rows.items():
        rates = (f"{100 * cell['rate']:10.1f}" if cell else f"{'-':>10}" for cell in cells)
        counts = " / ".join(dict.fromkeys(str(cell["of"]) for cell in cells if cell))
        print(f"{name:{width}}{''.join(rates)}   of {counts}")
