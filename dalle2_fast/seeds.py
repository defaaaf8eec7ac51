"""Seeds derived from seeds: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) for integers and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, SplitMix64's increment


def _finalise(state: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which each bit depends on all input bits."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def mix_seed(*values: int) -> int:
    """A 63-bit seed from integers, for random generators; neighbouring values give unrelated seeds.

    Example:
        >>> mix_seed(0, 1) == mix_seed(1, 0)
        False
    """
    state = 0
    for value in values:
        state = _finalise((state + value + _GOLDEN) & _MASK)
    return state >> 1


def sample_seed(seed: int, index: int) -> int:
    """The seed (int64, any sign) of sample `index` of a call that was made with `seed`.

    It is the number at position `index` of the SplitMix64 sequence that `seed` begins: different indices of
    one seed never collide.

    Example:
        >>> sample_seed(0, 0) != sample_seed(0, 1)
        True
    """
    state = _finalise((_finalise(seed & _MASK) + (index + 1) * _GOLDEN) & _MASK)
    return state - 2**64 if state >= 2**63 else state


def derived_seeds(
    seeds: Tensor,  # int64 [B]
    number: int | Tensor,  # int64, broadcasts against seeds
) -> Tensor:  # int64
    """The seeds of derivation `number` of the given ones; number 0 returns them unchanged.

    seeds xor (number * 2^64 / golden ratio), the product modulo 2^64.
    """
    golden = _GOLDEN - 2**64  # as a signed integer; a tensor's product wraps modulo 2^64
    if isinstance(number, int):
        offset = (number * golden) & _MASK
        return seeds ^ (offset - 2**64 if offset >= 2**63 else offset)
    return seeds ^ (number * golden)
