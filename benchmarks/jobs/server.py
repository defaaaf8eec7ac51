"""Load on `dalle2-fast serve`: requests per second, P50 and P99, batched and not; errors among them.

    python -m benchmarks.jobs.server [--requests 10000] [--unbatched 2000] [--scenes 24]

The server is a process of its own; the clients are connections of this one, which send the next request as
soon as they have an answer. `tiny` is tests/support/tiny_pipeline.py (32 x 32 pixels): it shows what the
server costs and whether anything is lost. `scenes` is the checkpoint in the package with its defaults (256 x
256, two candidates). One request in ten is malformed, in seven ways; every fourth correct one asks for a URL
and fetches it. Checked: each status is the expected one, the server has counted as many, the same seed always
gives the same picture, up to one 8-bit value. The result is benchmarks/results/server.json and server.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing.provenance import RESULTS, ROOT, machine, save, versions, write
from tests.support.tiny_pipeline import tiny_pipeline

GENERATE, VARIATIONS = "/v1/images/generations", "/v1/images/variations"
CAPTIONS = {
    "tiny": ["a red ring", "a blue square", "a ring above a square"],
    "scenes": ["a large red circle above a small blue square", "three green stars", "a yellow triangle"],
}
SEEDS = 50  # different ones: a seed comes again, and so must its picture
FORM = "multipart/form-data; boundary=b"


def request(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def part(name: str, data: bytes, file: str = "") -> bytes:
    file = f'; filename="{file}"' if file else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"


MALFORMED = [  # what is sent, and the status that answers it
    (request(GENERATE, b'{"prompt": "a red ring"'), 400),
    (request(GENERATE, b'{"prompt": "a red ring", "n": NaN}'), 400),
    (request(GENERATE, b'{"prompt": "a red ring", "n": "two"}'), 400),
    (request(GENERATE, json.dumps({"prompt": "red " * 2500}).encode()), 400),
    (request(GENERATE, b'{"prompt": "a red rign"}'), 400),
    (request(VARIATIONS, part("image", b"no image", "../../x.png") + b"--b--\r\n", FORM), 400),
    (b"GET /v1/images/files/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: a\r\n\r\n", 404),
]


@contextmanager
def server(checkpoint: Path | None, threads: int, *options: str) -> Iterator[tuple[int, int]]:
    """A server; its port and process id."""
    command = [sys.executable, "-m", "dalle2_fast", "serve", "--port", "0", "--device", "cpu",
               "--dtype", "fp32", "--quiet", "--url-memory", "1", *options]  # fmt: skip
    command += [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield int(re.search(r":(\d+) ", process.stdout.readline())[1]), process.pid
        process.terminate()
        if process.wait(60):
            raise RuntimeError(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.stdout.close()


class Load:
    """So many requests over so many connections."""

    def __init__(self, model: str, port: int, pid: int, count: int, connections: int) -> None:
        self.captions, self.port, self.pid = CAPTIONS[model], port, pid
        self.connections, self.count = connections, count
        self.numbers = iter(range(count))
        self.seconds: list[float] = []  # of correct requests for pictures
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.pictures: dict[int, np.ndarray] = {}  # by seed
        self.difference, self.compared = 0, 0
        self.memory: list[float] = []  # MiB, every tenth of the requests

    async def run(self) -> float:
        """The seconds that all requests took."""
        began = time.perf_counter()
        await asyncio.gather(*(self._client() for _ in range(self.connections)))
        return time.perf_counter() - began

    async def _client(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def ask(sent: bytes) -> tuple[int, bytes]:
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]))
            self.statuses[int(head[9:12])] += 1
            return int(head[9:12]), body

        for number in self.numbers:
            if number % max(1, self.count // 10) == 0:
                self.memory.append(resident(self.pid))
            try:
                if number % 10 == 9:
                    sent, expected = MALFORMED[number // 10 % len(MALFORMED)]
                    status, body = await ask(sent)
                    if status != expected or b"error" not in body:
                        self.wrong.append(f"{status} for {sent[:60]!r}")
                else:
                    await self._draw(ask, number)
            except (OSError, EOFError) as error:
                self.wrong.append(f"{number}: {type(error).__name__}")
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()

    async def _draw(self, ask, number: int) -> None:
        seed, as_url = number * 7 % SEEDS, number % 4 == 0
        fields = {"prompt": self.captions[seed % len(self.captions)], "seed": seed}
        fields["response_format"] = "url" if as_url else "b64_json"
        began = time.perf_counter()
        status, body = await ask(request(GENERATE, json.dumps(fields).encode()))
        self.seconds.append(time.perf_counter() - began)
        if status != 200:
            self.wrong.append(f"{status} for seed {seed}")
            return
        entry = json.loads(body)["data"][0]
        if as_url:
            path = entry["url"][entry["url"].index("/v1") :]
            status, file = await ask(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            if status != 200:
                self.wrong.append(f"{status} for a URL")
                return
        else:
            file = base64.b64decode(entry["b64_json"])
        if number % 5:  # decoding takes time from the server
            return
        pixels = np.asarray(Image.open(io.BytesIO(file)), int)
        known = self.pictures.setdefault(seed, pixels)
        self.difference = max(self.difference, int(np.abs(known - pixels).max()))
        self.compared += known is not pixels


def resident(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def measure(
    model: str, checkpoint: Path | None, max_batch: int, count: int, connections: int, threads: int
) -> dict:
    """One row of the table."""
    with server(checkpoint, threads, "--max-batch", str(max_batch)) as (port, pid):
        load = os.getloadavg()[0]
        if model == "tiny":  # buffers and allocator reach their size
            asyncio.run(Load(model, port, pid, 100, connections).run())
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        before = totals(metrics)
        run = Load(model, port, pid, count, connections)
        seconds = asyncio.run(run.run())
        run.memory.append(resident(pid))
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        after = totals(metrics)
    counted = Counter(after["requests"])
    counted.subtract(before["requests"])
    if run.wrong or any(counted[status] != number for status, number in run.statuses.items()):
        raise RuntimeError(f"wrong: {run.wrong[:5]}; server {counted}, clients {run.statuses}")
    if run.difference > 1:
        raise RuntimeError(f"the same seed gave pictures that differ by {run.difference}")
    quantiles = np.percentile(run.seconds, [50, 99]) * 1000
    batches = after["batches"] - before["batches"]
    return {
        "model": model, "max_batch": max_batch, "connections": connections, "requests": count,
        "statuses": {str(status): number for status, number in sorted(run.statuses.items())},
        "seconds": round(seconds, 1), "requests_per_s": round(count / seconds, 1),
        "pictures_per_s": round(len(run.seconds) / seconds, 2),
        "p50_ms": round(float(quantiles[0]), 1), "p99_ms": round(float(quantiles[1]), 1),
        "mean_batch": round((after["pictures"] - before["pictures"]) / batches, 2),
        "memory_mib": [round(each, 1) for each in run.memory],
        "pictures_compared": run.compared, "largest_difference": run.difference,
        "load_before": round(load, 1),
    }  # fmt: skip


def totals(metrics: str) -> dict:
    requests: Counter[int] = Counter()
    found = re.findall(r'dalle2_requests_total\{route="(.*)",status="(\d+)"\} (\S+)', metrics)
    for route, status, value in found:
        requests[int(status)] += int(float(value)) if route != "/metrics" else 0
    sums = {
        name: float(re.search(rf"^dalle2_batch_size_{kind} (\S+)", metrics, re.MULTILINE)[1])
        for name, kind in (("pictures", "sum"), ("batches", "count"))
    }
    return {"requests": requests, **sums}


def rounding(dtype: str) -> dict:
    """How far pictures of the package's checkpoint in a batch are from the same alone."""
    from dalle2_fast import DALLE2
    from dalle2_fast.data.images import to_pil

    pipe = DALLE2.from_pretrained(device="cpu", dtype=dtype)
    captions, seeds = CAPTIONS["scenes"], [1, 2, 3]
    together = to_pil(pipe.generate(captions, 1, seed=seeds, size=64).images)
    alone = [
        to_pil(pipe.generate(caption, 1, seed=seed, size=64).images)[0]
        for caption, seed in zip(captions, seeds, strict=True)
    ]
    differences = np.abs(np.stack(together).astype(int) - np.stack(alone).astype(int))
    return {
        "dtype": dtype,
        "pictures": len(seeds),
        "size": 64,
        "largest": int(differences.max()),
        "mean": float(f"{differences.mean():.3g}"),
        "values_that_differ": float(f"{(differences > 0).mean():.3g}"),
    }


def report(result: dict) -> str:
    """The table."""
    about = result["machine"]
    where = f"{about['threads']} thread, {about['cores']} cores of {about['cpu']}"
    source = f"{result['date']}, commit {result['commit']}, {where}, float32"
    heads = ("model", "--max-batch", "connections", "requests", "per second", "pictures per second",
             "P50, ms", "P99, ms", "mean batch", "memory, MiB: begin, middle, end")  # fmt: skip
    lines = [
        "# Load on `dalle2-fast serve`",
        "",
        f"`python -m benchmarks.jobs.server`, {source}. {result['note']}".rstrip(),
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in result["rows"]:
        memory = row["memory_mib"]
        shown = ", ".join(f"{each:.0f}" for each in (memory[0], memory[len(memory) // 2], memory[-1]))
        keys = ("model", "max_batch", "connections", "requests", "requests_per_s", "pictures_per_s", "p50_ms",
                "p99_ms", "mean_batch")  # fmt: skip
        lines.append(f"| {' | '.join(str(row[key]) for key in keys)} | {shown} |")
    compared = sum(row["pictures_compared"] for row in result["rows"])
    largest = max(row["largest_difference"] for row in result["rows"])
    lines += [
        "",
        "One request in ten is malformed and got its 4xx; every other one got its picture, and the server",
        f"counted as many. {compared} pictures of a seed that had been seen before differed by at most",
        f"{largest} of 255, whichever batch they were drawn in.",
        "",
    ]
    for row in result["rounding"]:
        lines.append(
            f"- The package's checkpoint in {row['dtype']}: {row['pictures']} pictures of 64 x 64, in one "
            f"batch and each alone, differ by at most {row['largest']} of 255, by {row['mean']} on average."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.server", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--requests", type=int, default=10_000, help="to the tiny pipeline, batched")
    parser.add_argument("--unbatched", type=int, default=2000, help="to the tiny pipeline, --max-batch 1")
    parser.add_argument("--scenes", type=int, default=24, help="to the checkpoint in the package; 0: none")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of the server's computation")
    parser.add_argument("--note", default="", help="kept in the file, e.g. other load on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    packages = versions("fastapi", "uvicorn", "starlette")
    about = {"machine": machine(), "versions": packages, "note": arguments.note}
    about["machine"]["threads"] = arguments.threads
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_pipeline().save_pretrained(Path(folder) / "tiny")
        plan = [("tiny", tiny, 1, arguments.unbatched), ("tiny", tiny, 8, arguments.requests)]
        for model, checkpoint, size, count in plan:
            rows.append(measure(model, checkpoint, size, count, arguments.connections, arguments.threads))
            keep(about, rows, [])
    roundings = [rounding(dtype) for dtype in ("fp32", "bf16")]
    keep(about, rows, roundings)
    for size in (8, 1) if arguments.scenes else ():
        load = arguments.scenes, arguments.connections, arguments.threads
        rows.append(measure("scenes", None, size, *load))
        keep(about, rows, roundings)


def keep(about: dict, rows: list[dict], roundings: list[dict]) -> None:
    """Write what is known so far, because a whole run takes long."""
    path = save("server", {**about, "rows": rows, "rounding": roundings})
    write(RESULTS / "server.md", report(json.loads(path.read_text())))
    print(json.dumps(rows[-1]), path, flush=True)


if __name__ == "__main__":
    main()
