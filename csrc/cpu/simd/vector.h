// Vectors of VECTOR_BYTES bytes (GNU C vector extensions), and exp and log1p of them.
//
// There is no include guard: a file of inner loops includes this once per instruction set, each time in
// another namespace and with another VECTOR_BYTES. No templates of the standard library here: their
// instantiations would be shared with code for older processors.

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Integer __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t IntegerLane;
};

template <>
struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Integer __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t IntegerLane;
};

template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
using Integer = typename Lanes<T>::Integer;
template <class T>
constexpr int WIDTH = VECTOR_BYTES / sizeof(T);  // lanes

// ------------------------------------------------------------------------------------------ loads and stores

template <class T>
INLINE Vector<T> load(const T* from) {
    Vector<T> value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
INLINE void store(T* to, Vector<T> value) {
    __builtin_memcpy(to, &value, sizeof value);
}

template <class T>
INLINE void store(T* to, Vector<T> value, int64_t count) {  // the first `count` lanes only
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
}

template <class T>
INLINE Vector<T> fill(T value) {
    return value - Vector<T>{};  // a subtraction of 0, unlike an addition, costs no instruction
}

template <class T>
INLINE double sum(Vector<T> value) {
    double total = 0;
    for (int lane = 0; lane < WIDTH<T>; ++lane) total += value[lane];
    return total;
}

// A mask: all bits set in the lanes 0 <= lane < count.
template <class T>
INLINE Integer<T> first_lanes(int64_t count) {
    Integer<T> lane;
    for (int i = 0; i < WIDTH<T>; ++i) lane[i] = i;
    return lane < static_cast<typename Lanes<T>::IntegerLane>(count);
}

// Calls visit(first column, number of lanes) for a row of `columns`, one vector at a time. A vector at the
// end of the row reads into the padding; only its first lanes count.
template <class T, class Visit>
INLINE void for_each_vector(int64_t columns, Visit visit) {
    int64_t j = 0;
    for (; j + WIDTH<T> <= columns; j += WIDTH<T>) visit(j, int64_t(WIDTH<T>));
    if (j < columns) visit(j, columns - j);
}

template <class T>
INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {  // a where b is NaN
    return b > a ? b : a;
}

template <class T>
INLINE Vector<T> finite_or_zero(Vector<T> value) {
    return value - value == 0 ? value : fill(T(0));
}

// --------------------------------------------------------------------------------------------- exp and log1p

// Constants of exp(x) = 2^n exp(f), |f| <= log(2) / 2. The remainder f^(TERMS + 1) / (TERMS + 1)! of the
// Taylor series is below rounding.
template <class T>
struct Exponential;

template <>
struct Exponential<float> {
    static constexpr int TERMS = 7, BIAS = 127, MANTISSA = 23;
    static constexpr float ROUND = 12582912.0f;                    // 1.5 2^23: adding it rounds to an integer
    static constexpr float HIGH = 0.693359375f;                    // log 2 in 10 bits: n HIGH is exact
    static constexpr float LOW = float(-2.12194440054690583e-4L);  // log 2 - HIGH
    static constexpr float MIN = -87.9f, MAX = 89.0f;              // 0 and infinity beyond
};

template <>
struct Exponential<double> {
    static constexpr int TERMS = 13, BIAS = 1023, MANTISSA = 52;
    static constexpr double ROUND = 6755399441055744.0;        // 1.5 2^52
    static constexpr double HIGH = 2977044471.0 / 4294967296;  // log 2 in 32 bits
    static constexpr double LOW =
        double(0.693147180559945309417232121458176568L - 2977044471.0L / 4294967296);
    static constexpr double MIN = -708.9, MAX = 710.0;
};

// exp(x) 2^-shift, within 2 units in the last place for |x| + |shift| up to some 5000. The shift costs no
// accuracy, as subtracting a logarithm from x would. 0 and infinity out of range, NaN for NaN.
template <class T>
INLINE Vector<T> exponential(Vector<T> x, int shift = 0) {
    using E = Exponential<T>;
    const T range_offset = shift * T(0.693147180559945309417232121458176568L);
    const Vector<T> min = fill(E::MIN + range_offset), max = fill(E::MAX + range_offset);
    x = x < min ? min : x;
    x = x > max ? max : x;
    const Vector<T> rounded = x * T(1.44269504088896340735992468100189214L) + E::ROUND;
    const Vector<T> n = rounded - E::ROUND;
    const Vector<T> f = (x - n * E::HIGH) - n * E::LOW;
    T factorial = 1;
    for (int k = 2; k <= E::TERMS; ++k) factorial *= k;
    Vector<T> y = fill(1 / factorial);
#pragma GCC unroll 16
    for (int k = E::TERMS; k >= 1; --k) {
        factorial /= k;
        y = y * f + 1 / factorial;
    }
    Integer<T> power, zero;  // n and 0 as integers in the low bits of the mantissa
    const Vector<T> origin = fill(E::ROUND);
    __builtin_memcpy(&power, &rounded, sizeof power);
    __builtin_memcpy(&zero, &origin, sizeof zero);
    power = (power - zero + (E::BIAS - shift)) << E::MANTISSA;
    Vector<T> scale;
    __builtin_memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

// log(1 + u) for 0 <= u <= 1, to full relative precision: 2 atanh(u / (2 + u)).
template <class T>
INLINE Vector<T> log_one_plus(Vector<T> u) {
    constexpr int TERMS = sizeof(T) == 4 ? 8 : 17;
    const Vector<T> w = u / (u + 2);
    const Vector<T> square = w * w;
    Vector<T> y = fill(T(1) / (2 * TERMS + 1));
#pragma GCC unroll 20
    for (int k = TERMS - 1; k >= 0; --k) y = y * square + T(1) / (2 * k + 1);
    return 2 * w * y;
}
