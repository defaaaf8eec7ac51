"""Maths that several kernels share: @triton.jit functions from values in registers to values in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) of float32 in 5 instructions (tl.sigmoid: 11), with an error of 3e-7.

    Division and exp handle denormals, which have no effect on 1 + exp(-z); exp2 and rsqrt do not handle them.
    """
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def silu(z):
    """z sigmoid(z)"""
    return z * sigmoid(z)


@triton.jit
def silu_derivative(z):
    """d silu / dz = s + z s (1 - s), s = sigmoid(z)"""
    s = sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def merge_moments(count, mean, squares, new_count, new_mean, new_squares):
    """Count, mean and sum of squared deviations of the union of two sets, of which either may be empty.

    Source: Chan, Golub, LeVeque 1979.
    """
    together = count + new_count
    difference = new_mean - mean
    new_fraction = new_count / tl.maximum(together, 1.0)
    squares += new_squares + difference * difference * count * new_fraction
    return together, mean + difference * new_fraction, squares


# ---------------------------------------------------------------------------------------------- normal noise
# Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller give the numbers of reference.sample_noise. tl.randn
# is not used: its sine and cosine compile to fp64 instructions, and it takes neither a step nor 64-bit seeds.


@triton.jit
def philox_4x32_10(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words whose shapes broadcast. Words that are one for a tile stay scalar."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53  # one widening multiplication gives both halves
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def log_of_uniform(u):
    """log(u) for u in [2^-33, 1], relative error 1e-7. Near 1 the hardware's logarithm is less exact."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # u = (1 + f) 2^exponent with 1 + f in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # A minimax polynomial for (log(1 + f) - f) / f^2; the error of the logarithm is 3e-8.
    p = -0.14307483073 + f * 0.08734750616
    p = 0.14917988787 + f * p
    p = -0.16570514069 + f * p
    p = 0.19962071283 + f * p
    p = -0.25001755014 + f * p
    p = 0.33333950239 + f * p
    p = -0.49999991608 + f * p
    return exponent.to(tl.float32) * 0.69314718056 + (f + f * f * p)


@triton.jit
def cos_sin_of_turns(u):
    """cos(2 pi u), sin(2 pi u) for u in [0, 1]: exact reduction to an eighth of a turn, then polynomials."""
    shifted = u * 4.0 + 12582912.0  # 1.5 * 2^23: the sum holds round(4 u) in its low bits
    quarter = shifted.to(tl.int32, bitcast=True)
    rest = u - (shifted - 12582912.0) * 0.25
    square = rest * rest
    # Minimax polynomials on [-1/8, 1/8]; the errors are 4e-8 (cosine) and 3e-9 (sine).
    cosine = 1.0 + square * (-19.739163301 + square * (64.922421904 + square * -83.629185131))
    sine = 81.592353552 + square * -75.393562700
    sine = rest * (6.2831852868 + square * (-41.341661455 + square * sine))
    odd = (quarter & 1) != 0
    cosine_bits = tl.where(odd, sine, cosine).to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    sine_bits = tl.where(odd, cosine, sine).to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)
    return cosine_bits.to(tl.float32, bitcast=True), sine_bits.to(tl.float32, bitcast=True)


@triton.jit
def philox_normal(seed, step, first, SIZE: tl.constexpr):
    """Standard normal numbers first, ..., first + SIZE - 1 of a sample, float32 [SIZE].

    seed, step: int64 scalars. first: a multiple of 4, below 2^34. SIZE: a power of two, at least 4.
    """
    GROUPS: tl.constexpr = SIZE // 4
    group = (first // 4).to(tl.uint32) + tl.arange(0, GROUPS).to(tl.uint32)
    zero = (first * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32_10(
        group,
        zero,
        step.to(tl.uint32),
        (step >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    # u in (0, 1] for the logarithm, rounded to float32 as in the reference.
    u_radius = tl.join(w0, w2).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u_angle = tl.join(w1, w3).to(tl.float32) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * log_of_uniform(u_radius))
    cosine, sine = cos_sin_of_turns(u_angle)
    return tl.join(radius * cosine, radius * sine).reshape(SIZE)
