"""What can be done to a safetensors file: a header that lies about its tensors, or that is none."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from tests.hostile.damage import FLIPPED, HUGE, Damage, content, flip, void


def safetensors_header(change: Callable[[dict], object]) -> Damage:
    """Rewrite the JSON header of a safetensors file."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def first_tensor(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


def config_of_header(change: Callable[[str], str]) -> Damage:
    """Change the config that training writes into the header of its weights."""
    return safetensors_header(
        lambda header: void(header["__metadata__"].update(config=change(header["__metadata__"]["config"])))
    )


def integers(header: dict) -> None:
    """The floating-point tensors become integers of the same size."""
    for name, tensor in header.items():
        if name != "__metadata__":
            kind = tensor["dtype"]
            tensor["dtype"] = {"F32": "I32", "F16": "I16", "BF16": "I16"}.get(kind, kind)


def bytes_for_weights(header: dict) -> None:
    """Every tensor of numbers of 32 bits becomes one of four times as many of 8 bits, as quantisers write."""
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["dtype"] == "F32" and tensor["shape"]:
            tensor.update(dtype="I8", shape=[*tensor["shape"][:-1], 4 * tensor["shape"][-1]])


def overlapping(header: dict) -> None:
    """The second tensor claims the bytes of the first one."""
    first, second = [value for name, value in header.items() if name != "__metadata__"][:2]
    second.update(shape=first["shape"], data_offsets=first["data_offsets"], dtype=first["dtype"])


SAFETENSORS: dict[str, Damage] = {
    "header length 2^62": lambda path: content(struct.pack("<Q", 2**62) + path.read_bytes()[8:])(path),
    "header nested deeply": safetensors_header(lambda header: b"[" * 100_000),
    "header is a list": safetensors_header(lambda header: [1]),
    "shape of 10^9": safetensors_header(lambda header: void(first_tensor(header).update(shape=[HUGE, HUGE]))),
    "offsets beyond the end": safetensors_header(
        lambda header: void(first_tensor(header).update(data_offsets=[0, 2**50]))
    ),
    "an unknown dtype": safetensors_header(lambda header: void(first_tensor(header).update(dtype="Q4"))),
    "integers for weights": safetensors_header(integers),
    "8-bit integers for weights": safetensors_header(bytes_for_weights),
    "two tensors in one place": safetensors_header(overlapping),
    "flipped in the header": flip(0.001),
    FLIPPED: flip(0.7),
}  # fmt: skip

CONFIG_IN_HEADER: dict[str, Damage] = {
    "config in the header nested deeply": config_of_header(lambda config: "[" * 100_000),
    "config in the header is a list": config_of_header(lambda config: "[1]"),
    "config in the header asks for 10^9 layers": config_of_header(
        lambda config: config.replace('"visual_enc_depth": 1', f'"visual_enc_depth": {HUGE}')
    ),
    "config in the header without its end": config_of_header(lambda config: config[:-9]),
}
