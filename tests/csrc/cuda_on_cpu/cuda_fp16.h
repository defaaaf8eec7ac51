// float16 on the CPU under CUDA's names: rounds to nearest even, keeps subnormal numbers, infinities and NaN.
#pragma once
#include "cuda_runtime.h"

struct alignas(2) __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half value) {
    int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
    float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                 : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                : std::ldexp(float(mantissa), -24);
    return value.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float value) {
    uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    float size = std::fabs(value);
    if (size != size) return {uint16_t(sign | 0x7e00)};
    if (size >= 65520) return {uint16_t(sign | 0x7c00)};
    int exponent = std::max(std::ilogb(size), -14);  // ilogb(0) is far below
    int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024..2048; fewer if subnormal
    // A carry of the mantissa (units = 2048) goes into the exponent without further work.
    return {uint16_t(sign | ((exponent + 14) * 1024 + units))};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
