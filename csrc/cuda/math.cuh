// exp, log1p and log-add-exp with the accuracy that the losses need and no more.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace dalle2_fast::cuda {

constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LOG2_E_REMAINDER = 1.92596299112661746887e-8f;  // log2(e) - LOG2_E
constexpr double LOG_2 = 0.693147180559945309417;

__device__ __forceinline__ float fast_exp2(float x) {  // relative error 2^-22; 0 for results below 2^-126
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// For terms that count only near x = 0. Far from it the rounding of the product shows: 3e-6 at x = 70.
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * LOG2_E); }

// exp(x) 2^-shift with a relative error of 3e-7, for all x and an integer shift. x log2(e) = whole + part is
// almost exact, where x - shift log(2) would be rounded. An infinite x may give NaN.
__device__ __forceinline__ float shifted_exp(float x, float shift) {
    constexpr float ROUND = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
    const float whole = fmaf(x, LOG2_E, ROUND) - ROUND;
    const float part = fmaf(x, LOG2_E_REMAINDER, fmaf(x, LOG2_E, -whole));
    return fast_exp2(whole - shift) * fast_exp2(part);
}

// log(1 + u), 0 <= u <= 1, with a relative error of 2e-7, also for small u: most of a sigmoid loss are small
// terms. u times the polynomial through log(1 + u) / u at the 10 Chebyshev points of [0, 1].
__device__ __forceinline__ float log_one_plus(float u) {
    constexpr float TERMS[] = {1.0f,         -0.49999893f, 0.3332971f,   -0.24951616f, 0.19663274f,
                               -0.15269667f, 0.10543624f,  -0.05637361f, 0.01954253f,  -0.00317606f};
    float y = TERMS[9];
#pragma unroll
    for (int k = 8; k >= 0; --k) y = fmaf(y, u, TERMS[k]);
    return y * u;
}

__device__ __forceinline__ float finite_or_zero(float x) { return x - x == 0 ? x : 0.0f; }

__device__ __forceinline__ double log_add_exp(double a, double b) {  // log(exp a + exp b)
    if (a != a || b != b) return a + b;
    const double larger = a > b ? a : b, smaller = a > b ? b : a;
    return larger - larger == 0 ? larger + log1p(exp(smaller - larger)) : larger;
}

}  // namespace dalle2_fast::cuda
