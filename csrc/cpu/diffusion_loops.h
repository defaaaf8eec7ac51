// The inner loops of cpu/diffusion.cpp, which includes this file once per instruction set.
//
// They run over rows of float32 that are padded to whole vectors. Only the conversions from and to stored
// values need to know where a row ends.

// The compiler may round a product and a sum once (FMA). A square root does not set errno.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast", "no-math-errno")
#endif

#include "cpu/simd/vector.h"
#include "cpu/simd/vector_storage.h"

// --------------------------------------------------------------------------------------------- stored values

// The padding becomes 0.
template <class S>
void to_row(const S* from, int64_t count, float* row) {
    for_each_vector<float>(count, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        store(row + j, lanes < FLOATS ? load_float(from + j, lanes) : load_float(from + j));
    });
}

template <class S>
void from_row(const float* row, int64_t count, S* to) {
    for_each_vector<float>(count, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        lanes < FLOATS ? store_float(to + j, load(row + j), lanes) : store_float(to + j, load(row + j));
    });
}

// ----------------------------------------------------------------------------------------------------- noise

// 32-bit words in lanes of 64 bits, as the multiplication takes them. The upper half of a lane may be anything.
typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t BLOCKS = VECTOR_BYTES / 8;

INLINE Words multiply(Words word, uint64_t factor) {  // factor < 2^32; all 64 bits of the product
#if VECTOR_BYTES == 64
    return Words(_mm512_maskz_mul_epu32(0xff, __m512i(word), __m512i(Words{} + factor)));
#elif VECTOR_BYTES == 32
    return Words(_mm256_mul_epu32(__m256i(word), __m256i(Words{} + factor)));
#elif defined(__SSE2__)
    return Words(_mm_mul_epu32(__m128i(word), __m128i(Words{} + factor)));
#else
    return (word & 0xffffffffu) * factor;
#endif
}

// Words 0 and 2 of each block in turn, and words 1 and 3. Equal lanes give a pair of normal numbers.
struct WordPairs {
    Bits radius, angle;
};

INLINE Bits in_turn(Words even, Words odd) {
    const Words both = (even & 0xffffffffu) | (odd << 32);
    Bits words;
    __builtin_memcpy(&words, &both, sizeof words);
    return words;
}

constexpr int ROUNDS = 10;

// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). keys: two per round.
INLINE WordPairs philox(Words block, uint64_t step, const uint64_t* keys) {
    Words c0 = block, c1 = block >> 32, c2 = Words{} + step, c3 = Words{} + (step >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < ROUNDS; ++round) {
        const Words product0 = multiply(c0, 0xD2511F53u), product1 = multiply(c2, 0xCD9E8D57u);
        c0 = (product1 >> 32) ^ c1 ^ keys[2 * round];
        c2 = (product0 >> 32) ^ c3 ^ keys[2 * round + 1];
        c1 = product1;
        c3 = product0;
    }
    return {in_turn(c0, c2), in_turn(c1, c3)};
}

INLINE Integer<float> as_integer(Vector<float> value) {
    Integer<float> bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE Vector<float> square_root(Vector<float> value) {
#if VECTOR_BYTES == 64
    return Vector<float>(_mm512_maskz_sqrt_ps(0xffff, __m512(value)));
#elif VECTOR_BYTES == 32
    return Vector<float>(_mm256_sqrt_ps(__m256(value)));
#else
    for (int64_t lane = 0; lane < FLOATS; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
    return value;
#endif
}

// log(u) for 2^-33 <= u <= 1 with a relative error of 1e-7, also near 1.
INLINE Vector<float> log_of_uniform(Vector<float> u) {
    const Integer<float> bits = as_integer(u);
    // u = (1 + f) 2^exponent with 1 + f in [sqrt(1/2), sqrt(2))
    const Integer<float> exponent = (bits - 0x3f3504f3) >> 23;
    const Integer<float> significand = bits - (exponent << 23);
    Vector<float> f;
    __builtin_memcpy(&f, &significand, sizeof f);
    f -= 1.0f;
    // A minimax polynomial for (log(1 + f) - f) / f^2; the error of the logarithm is 3e-8.
    Vector<float> p = f * 0.08734750616f - 0.14307483073f;
    p = p * f + 0.14917988787f;
    p = p * f - 0.16570514069f;
    p = p * f + 0.19962071283f;
    p = p * f - 0.25001755014f;
    p = p * f + 0.33333950239f;
    p = p * f - 0.49999991608f;
    return __builtin_convertvector(exponent, Vector<float>) * 0.69314718056f + (f * f * p + f);
}

struct Point {
    Vector<float> cosine, sine;
};

// The point of the unit circle at u turns, 0 <= u <= 1: exact reduction to an eighth of a turn, then
// polynomials.
INLINE Point point_at(Vector<float> u) {
    // With 1.5 2^23 added, the low bits hold round(4 u).
    const Vector<float> shifted = u * 4.0f + 12582912.0f;
    const Vector<float> rest = u - (shifted - 12582912.0f) * 0.25f, square = rest * rest;
    // Minimax polynomials on [-1/8, 1/8]; the errors are 4e-8 (cosine) and 3e-9 (sine).
    Vector<float> cosine = square * -83.629185131f + 64.922421904f;
    cosine = cosine * square - 19.739163301f;
    cosine = cosine * square + 1.0f;
    Vector<float> sine = square * -75.393562700f + 81.592353552f;
    sine = sine * square - 41.341661455f;
    sine = (sine * square + 6.2831852868f) * rest;
    const Bits quarter = as_bits(shifted);
    const Integer<float> odd = (quarter & 1u) != 0;
    return {as_float(as_bits(odd ? sine : cosine) ^ (((quarter + 1u) & 2u) << 30)),
            as_float(as_bits(odd ? cosine : sine) ^ ((quarter & 2u) << 30))};
}

// The first `count` normal numbers from block first_block on, and those that complete the last vectors.
inline void normal_numbers(uint64_t seed, uint64_t step, uint64_t first_block, int64_t count,
                           float* numbers) {
    uint64_t keys[2 * ROUNDS];
    for (int round = 0; round < ROUNDS; ++round) {
        keys[2 * round] = uint32_t(seed) + round * uint64_t(0x9E3779B9u);
        keys[2 * round + 1] = (seed >> 32) + round * uint64_t(0xBB67AE85u);
    }
    Words block;
    for (int64_t lane = 0; lane < BLOCKS; ++lane) block[lane] = first_block + lane;
    alignas(64) float cosines[PADDED / 2], sines[PADDED / 2];
    int64_t pairs = 0;
    for (; 2 * pairs < count; pairs += FLOATS, block += uint64_t(BLOCKS)) {
        const WordPairs words = philox(block, step, keys);
        // u in (0, 1] for the logarithm, rounded to float32 as in the reference.
        const Vector<float> u = __builtin_convertvector(words.radius, Vector<float>) * 0x1p-32f + 0x1p-33f;
        const Vector<float> radius = square_root(-2.0f * log_of_uniform(u));
        const Point point = point_at(__builtin_convertvector(words.angle, Vector<float>) * 0x1p-32f);
        store(cosines + pairs, radius * point.cosine);
        store(sines + pairs, radius * point.sine);
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {  // a loop that compilers turn into shuffles
        numbers[2 * pair] = cosines[pair];
        numbers[2 * pair + 1] = sines[pair];
    }
}

// result = alpha x + sigma noise
inline void weighted_sum(float alpha, const float* x, float sigma, const float* noise, int64_t count,
                         float* result) {
    for (int64_t j = 0; j < count; j += FLOATS)
        store(result + j, alpha * load(x + j) + sigma * load(noise + j));
}

// ------------------------------------------------------------------------------------------------------ step

INLINE Vector<float> guided_output(const Rows& rows, const Coefficients& k, int64_t j) {
    const Vector<float> conditional = load(rows.output + j);
    if (!rows.unconditional) return conditional;
    const Vector<float> unconditional = load(rows.unconditional + j);
    return unconditional + k.guidance * (conditional - unconditional);
}

// x0 before it is clipped, where x = alpha x0 + sigma epsilon.
INLINE Vector<float> predicted_x0(const Rows& rows, const Coefficients& k, int64_t j) {
    const Vector<float> output = k.output_factor * guided_output(rows, k, j);
    if (k.output_is_x0) return output;
    return (k.x_factor * load(rows.x + j) - k.sigma * output) * k.x0_factor;
}

inline void guide(const Rows& rows, const Coefficients& k, int64_t count, float* guided) {
    for (int64_t j = 0; j < count; j += FLOATS) store(guided + j, guided_output(rows, k, j));
}

inline void predict_x0(const Rows& rows, const Coefficients& k, int64_t count, float* x0) {
    for (int64_t j = 0; j < count; j += FLOATS) store(x0 + j, predicted_x0(rows, k, j));
}

inline void update(const Rows& rows, const Coefficients& k, int64_t count, float* next, float* clipped) {
    for (int64_t j = 0; j < count; j += FLOATS) {
        Vector<float> x0 = predicted_x0(rows, k, j);  // NaN stays NaN
        x0 = x0 < -k.limit ? fill(-k.limit) : x0;
        x0 = x0 > k.limit ? fill(k.limit) : x0;
        x0 *= k.shrink;
        store(clipped + j, x0);
        const Vector<float> previous = rows.previous ? load(rows.previous + j) : x0;
        Vector<float> result = k.a * load(rows.x + j) + (k.b * x0 + k.c * previous);
        if (rows.noise) {
            Vector<float> std = fill(k.std);
            if (rows.variance_logit) {  // Nichol and Dhariwal, 2102.09672, equation 15
                const Vector<float> fraction = (load(rows.variance_logit + j) + 1.0f) * 0.5f;
                const Vector<float> log_var = fraction * k.log_var_max + (1.0f - fraction) * k.log_var_min;
                std = exponential<float>(0.5f * log_var);
            }
            result += std * load(rows.noise + j);
        }
        store(next + j, result);
    }
}

// --------------------------------------------------------------------------------------------- statistics

// The sums of v - row[0] and of its square, for the values v of a row; the differences are exact.
inline void shifted_sums(const float* row, int64_t count, double* sum_out, double* squares_out) {
    typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));
    const double shift = row[0];
    Vector<double> first = {}, second = {};
    int64_t j = 0;
    for (; j + WIDTH<double> <= count; j += WIDTH<double>) {
        Half values;
        __builtin_memcpy(&values, row + j, sizeof values);
        const Vector<double> difference = __builtin_convertvector(values, Vector<double>) - shift;
        first += difference;
        second += difference * difference;
    }
    double total = sum<double>(first), squares = sum<double>(second);
    for (; j < count; ++j) {
        total += row[j] - shift;
        squares += (row[j] - shift) * (row[j] - shift);
    }
    *sum_out = total;
    *squares_out = squares;
}
