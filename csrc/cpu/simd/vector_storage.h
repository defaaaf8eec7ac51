// float32 vectors of values that are stored as float32, bfloat16 or float16 (cpu/simd/storage.h); exp and sigmoid.
// Like cpu/simd/vector.h, which comes first, it is included once per instruction set.

typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(VECTOR_BYTES / 2)));
constexpr int64_t FLOATS = VECTOR_BYTES / 4;

INLINE Vector<float> as_float(Bits bits) {
    Vector<float> value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE Bits as_bits(Vector<float> value) {
    Bits bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE Bits load_half_bits(const void* from) {
    HalfBits bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, Bits);
}

INLINE void store_half_bits(void* to, Bits bits) {
    const HalfBits narrow = __builtin_convertvector(bits, HalfBits);
    __builtin_memcpy(to, &narrow, sizeof narrow);
}

INLINE Vector<float> load_float(const float* from) { return load(from); }

INLINE Vector<float> load_float(const BFloat16* from) { return as_float(load_half_bits(from) << 16); }

INLINE Vector<float> load_float(const Float16* from) {
    const Bits half = load_half_bits(from), sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
    // The exponent's bias grows from 15 to 127 by a multiplication, which also gives subnormals their exponent.
    const Bits scaled = as_bits(as_float(magnitude) * 0x1p112f);
    const Bits infinite = magnitude >= (0x7c00u << 13);  // infinity or NaN: all exponent bits set
    return as_float(sign | scaled | (infinite & 0x7f800000u));
}

INLINE void store_float(float* to, Vector<float> value) { store(to, value); }

// Rounded to nearest, ties to even, as torch rounds. The instruction also makes subnormal numbers 0.
INLINE void store_float(BFloat16* to, Vector<float> value) {
#ifdef HAS_BF16_CONVERSION
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
    __builtin_memcpy(to, &rounded, sizeof rounded);
#else
    const Bits bits = as_bits(value);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    store_half_bits(to, value == value ? rounded : Bits{} + 0x7fc0u);
#endif
}

INLINE void store_float(Float16* to, Vector<float> value) {
    const Bits bits = as_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal halves: the exponent's bias shrinks from 127 to 15, 13 bits are rounded off. 65520 and more become
    // infinity by the carry. Below 2^-14 the addition of 0.5 leaves the subnormal's bits in the mantissa.
    const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    Bits half = magnitude < (113u << 23) ? small : normal;
    half = magnitude >= (143u << 23) ? Bits{} + 0x7c00u : half;  // 65536 and more, infinity
    half = magnitude > (255u << 23) ? Bits{} + 0x7e00u : half;   // NaN
    store_half_bits(to, sign | half);
}

// The first `count` < FLOATS values; the other lanes are 0.
template <class S>
INLINE Vector<float> load_float(const S* from, int64_t count) {
    S values[FLOATS] = {};
    for (int64_t lane = 0; lane < count; ++lane) values[lane] = from[lane];
    return load_float(values);
}

template <class S>
INLINE void store_float(S* to, Vector<float> value, int64_t count) {
    S values[FLOATS];
    store_float(values, value);
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = values[lane];
}

// exp(x) for x <= 0, within 2 units in the last place. AVX-512 multiplies by a power of two in one instruction.
INLINE Vector<float> exponential_below_zero(Vector<float> x) {
#if VECTOR_BYTES == 64
    // exp(x) = 2^n 2^f, |f| <= 1/2, with the best polynomial of its degree for 2^f. If x is NaN, max returns it.
    x = Vector<float>(_mm512_max_ps(__m512(fill(-150.0f)), __m512(x)));
    const Vector<float> rounded = x * 1.44269504f + 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
    const Vector<float> n = rounded - 12582912.0f, f = x * 1.44269504f - n;
    Vector<float> power = f * 0.00132764713f + 0.00967554096f;
    power = power * f + 0.0555071309f;
    power = power * f + 0.240221202f;
    power = power * f + 0.693146944f;
    power = power * f + 1.0f;
    return Vector<float>(_mm512_scalef_ps(__m512(power), __m512(n)));
#else
    return exponential<float>(x);
#endif
}

// 1 / (1 + exp(-x)) for results that are stored as S: within 2 units in the last place of float32, or, for half
// precision, with an error of 1e-4, a tenth of the rounding.
template <class S>
INLINE Vector<float> sigmoid(Vector<float> x) {
#if VECTOR_BYTES == 64
    // exp(-x) = 2^n 2^f, |f| <= 1/2, with the best polynomial of its degree for 2^f. AVX-512 multiplies by 2^n in
    // one instruction. Its division is slow: a step of Newton's method makes the fast reciprocal exact.
    constexpr bool EXACT = sizeof(S) == 4;
    // exp(80) is finite, and its reciprocal is a normal number. If x is NaN, max returns it.
    if (EXACT) x = Vector<float>(_mm512_max_ps(__m512(fill(-80.0f)), __m512(x)));
    const Vector<float> rounded = x * -1.44269504f + 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
    const Vector<float> n = rounded - 12582912.0f, f = x * -1.44269504f - n;
    Vector<float> power;
    if (EXACT) {
        power = f * 0.00132764713f + 0.00967554096f;
        power = power * f + 0.0555071309f;
        power = power * f + 0.240221202f;
        power = power * f + 0.693146944f;
        power = power * f + 1.0f;
    } else {
        power = f * 0.00957010128f + 0.0559178591f;
        power = power * f + 0.240247443f;
        power = power * f + 0.693121791f;
        power = power * f + 0.999999285f;
    }
    const Vector<float> divisor = 1.0f + Vector<float>(_mm512_scalef_ps(__m512(power), __m512(n)));
    const Vector<float> guess = Vector<float>(_mm512_rcp14_ps(__m512(divisor)));
    return EXACT ? guess * (2.0f - divisor * guess) : guess;
#else
    return 1.0f / (1.0f + exponential<float>(-x));
#endif
}
