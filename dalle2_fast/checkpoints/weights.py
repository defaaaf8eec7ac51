"""Putting named tensors into modules, and saying exactly which ones do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from dalle2_fast.checkpoints.folder import CheckpointError


def join_states(parts: Mapping[str, nn.Module | None]) -> dict[str, Tensor]:
    """{"clip": module, ...} -> {"clip.<key>": tensor, ...}; parts that are None are left out.

    A part that holds another one as a submodule of that name (a prior built around a CLIP, say) does not
    store it a second time.
    """
    tensors = {}
    for name, module in parts.items():
        if module is None:
            continue
        for key, tensor in module.state_dict().items():
            if key.partition(".")[0] not in parts:
                tensors[f"{name}.{key}"] = tensor
    return tensors


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, source: object) -> None:
    """Copy `tensors["<prefix>.<key>"]` into `module`, which must find every key, each of its own shape.

    `source` (a path) begins the message of the CheckpointError that names missing keys, leftover keys and
    wrong shapes. On an error nothing has been copied.
    """
    own = {key: value for key, value in module.state_dict().items()}
    given = {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}
    problems = []
    if missing := [key for key in own if key not in given]:
        problems.append(f"missing {_names(prefix, missing)}")
    if leftover := [key for key in given if key not in own]:
        problems.append(f"left over {_names(prefix, leftover)}")
    for key in [key for key in own if key in given and own[key].shape != given[key].shape][:3]:
        problems.append(f"{prefix}.{key}: expected {list(own[key].shape)}, got {list(given[key].shape)}")
    if problems:
        raise CheckpointError(
            f"{source}: the weights do not fit the {prefix} of the config: " + "; ".join(problems)
        )
    module.load_state_dict(given)


def reject_leftovers(tensors: Mapping[str, Tensor], prefixes: Iterable[str], source: object) -> None:
    """Raise CheckpointError if a tensor belongs to none of the parts called `prefixes`."""
    known = set(prefixes)
    if leftover := [key for key in tensors if key.partition(".")[0] not in known]:
        raise CheckpointError(
            f"{source}: tensors that belong to no part of the config: {_names('', leftover)}; "
            f"expected names that begin with {', '.join(f'{name}.' for name in sorted(known))}"
        )


def _names(prefix: str, keys: list[str], limit: int = 5) -> str:
    shown = [f"{prefix}.{key}" if prefix else key for key in keys[:limit]]
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{len(keys)} ({', '.join(shown)}{more})"
