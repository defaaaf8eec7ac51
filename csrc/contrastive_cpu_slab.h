// The inner loops of contrastive_cpu.cpp, which includes this file once for each instruction set: the compiler's
// target, the namespace around the include and VECTOR_BYTES, the size of a GNU C vector here, differ. No templates of
// the standard library here: what they instantiate would be shared with code for older processors.
//
// A slab is SLAB columns of a tile. One thread does a slab, row by row, so sums down its columns need nobody else;
// sums along the rows are left per slab, and the caller adds them up in the order of the slabs.

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Integer __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Whole;
};

template <>
struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Integer __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Whole;
};

template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
using Integer = typename Lanes<T>::Integer;
template <class T>
constexpr int WIDTH = VECTOR_BYTES / sizeof(T);

#define INLINE inline __attribute__((always_inline))

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
INLINE void store(T* to, Vector<T> value, int64_t count) {  // the first lanes only
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
}

template <class T>
INLINE Vector<T> fill(T value) {
    return Vector<T>{} + value;
}

template <class T>
INLINE double sum(Vector<T> value) {
    double total = 0;
    for (int lane = 0; lane < WIDTH<T>; ++lane) total += value[lane];
    return total;
}

// All ones in the lanes from 0 to count - 1.
template <class T>
INLINE Integer<T> first_lanes(int64_t count) {
    Integer<T> lane;
    for (int i = 0; i < WIDTH<T>; ++i) lane[i] = i;
    return lane < static_cast<typename Lanes<T>::Whole>(count);
}

template <class T>
struct Exponential;  // constants of 2^n exp(f), |f| <= log(2) / 2: f^(TERMS + 1) / (TERMS + 1)! is below rounding

template <>
struct Exponential<float> {
    static constexpr int TERMS = 7, BIAS = 127, MANTISSA = 23;
    static constexpr float ROUND = 12582912.0f;                // 1.5 2^23: adding it rounds to an integer
    static constexpr float HIGH = 0.693359375f;                // log 2, in 10 bits: n HIGH is exact
    static constexpr float LOW = float(-2.12194440054690583e-4L);  // the rest of log 2
    static constexpr float LEAST = -87.9f, MOST = 89.0f;       // 0 and infinity beyond
};

template <>
struct Exponential<double> {
    static constexpr int TERMS = 13, BIAS = 1023, MANTISSA = 52;
    static constexpr double ROUND = 6755399441055744.0;        // 1.5 2^52
    static constexpr double HIGH = 2977044471.0 / 4294967296;  // 32 bits
    static constexpr double LOW = double(0.693147180559945309417232121458176568L - 2977044471.0L / 4294967296);
    static constexpr double LEAST = -708.9, MOST = 710.0;
};

// exp(x) / 2^halvings, within 2 units in the last place, for |x| + |halvings| up to some 5000: the halvings cost no
// accuracy, as subtracting a logarithm would. 0 and infinity out of range, NaN for NaN.
template <class T>
INLINE Vector<T> exponential(Vector<T> x, int halvings = 0) {
    using E = Exponential<T>;
    const T origin_of_range = halvings * T(0.693147180559945309417232121458176568L);
    const Vector<T> least = fill(E::LEAST + origin_of_range), most = fill(E::MOST + origin_of_range);
    x = x < least ? least : x;
    x = x > most ? most : x;
    const Vector<T> shifted = x * T(1.44269504088896340735992468100189214L) + E::ROUND;
    const Vector<T> n = shifted - E::ROUND;
    const Vector<T> f = (x - n * E::HIGH) - n * E::LOW;
    T factorial = 1;
    for (int k = 2; k <= E::TERMS; ++k) factorial *= k;
    Vector<T> y = fill(1 / factorial);
#pragma GCC unroll 16
    for (int k = E::TERMS; k >= 1; --k) {
        factorial /= k;
        y = y * f + 1 / factorial;
    }
    Integer<T> power, zero;
    const Vector<T> origin = fill(E::ROUND);
    __builtin_memcpy(&power, &shifted, sizeof power);
    __builtin_memcpy(&zero, &origin, sizeof zero);
    power = (power - zero + (E::BIAS - halvings)) << E::MANTISSA;
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

// The columns of a row, a vector at a time; `visit(first column, lanes that count)`.
template <class T, class Visit>
INLINE void across(int64_t columns, Visit visit) {
    int64_t j = 0;
    for (; j + WIDTH<T> <= columns; j += WIDTH<T>) visit(j, int64_t(WIDTH<T>));
    if (j < columns) visit(j, columns - j);
}

// ----------------------------------------------------------------------------------------------------------- lse

constexpr int64_t FLUSH = 32;  // rows whose terms a column adds up in T before it goes on in double

// row_sums[rows] and column_sums[columns] of exp(L) / 2^halvings.
template <class T>
void sum_slab(const Slab<T>& slab, int halvings, double* row_sums, double* column_sums) {
    alignas(32) T terms[SLAB];
    for (int64_t j = 0; j < slab.columns; ++j) column_sums[j] = 0;
    for (int64_t begin = 0; begin < slab.rows; begin += FLUSH) {
        const int64_t end = begin + FLUSH < slab.rows ? begin + FLUSH : slab.rows;
        for (int64_t j = 0; j < SLAB; ++j) terms[j] = 0;
        for (int64_t i = begin; i < end; ++i) {
            const T* row = slab.products + i * slab.stride;
            Vector<T> total = fill(T(0));
            across<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
                const Vector<T> logits = load(row + j) * slab.scale;
                Vector<T> term = exponential<T>(logits, halvings);
                if (lanes < WIDTH<T>) term = first_lanes<T>(lanes) ? term : fill(T(0));
                total += term;
                store(terms + j, load(terms + j) + term);
            });
            row_sums[i] = sum<T>(total);
        }
        for (int64_t j = 0; j < slab.columns; ++j) column_sums[j] += terms[j];
    }
}

template <class T>
INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {  // a where b is NaN
    return b > a ? b : a;
}

template <class T>
INLINE Vector<T> finite_or_zero(Vector<T> value) {
    return value - value == 0 ? value : fill(T(0));
}

// log sum exp of a row of L about its maximum. NaN if there is one, infinity if there is one.
template <class T>
double row_lse_about_maximum(const T* row, int64_t columns, T scale) {
    Vector<T> most = fill(-T(INFINITY));
    across<T>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        Vector<T> logits = load(row + j) * scale;
        if (lanes < WIDTH<T>) logits = first_lanes<T>(lanes) ? logits : fill(-T(INFINITY));
        most = larger<T>(most, logits);
    });
    T maximum = most[0];
    for (int lane = 1; lane < WIDTH<T>; ++lane) maximum = most[lane] > maximum ? most[lane] : maximum;
    maximum = maximum - maximum == 0 ? maximum : 0;
    double total = 0;
    across<T>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        Vector<T> term = exponential<T>(load(row + j) * scale - maximum);
        if (lanes < WIDTH<T>) term = first_lanes<T>(lanes) ? term : fill(T(0));
        total += sum<T>(term);
    });
    return maximum + __builtin_log(total);
}

// The same down `columns` columns of a tile: lse[columns].
template <class T>
void column_lse_about_maximum(const T* products, int64_t stride, int64_t rows, int64_t columns, T scale,
                              double* lse) {
    across<T>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        const T* first = products + j;
        Vector<T> maximum = fill(-T(INFINITY));
        for (int64_t i = 0; i < rows; ++i) maximum = larger<T>(maximum, load(first + i * stride) * scale);
        maximum = finite_or_zero<T>(maximum);
        double totals[WIDTH<T>] = {};
        for (int64_t i = 0; i < rows; ++i) {
            const Vector<T> term = exponential<T>(load(first + i * stride) * scale - maximum);
            for (int lane = 0; lane < WIDTH<T>; ++lane) totals[lane] += term[lane];
        }
        for (int64_t lane = 0; lane < lanes; ++lane) lse[j + lane] = maximum[lane] + __builtin_log(totals[lane]);
    });
}

// ------------------------------------------------------------------------------------------------------ gradients

// A float64 lse as a pair whose sum it is: L - high is exact near the maximum. An infinite one has no rest.
template <class T>
INLINE T rest(double lse) {
    const T high = T(lse);
    return high - high == 0 ? T(lse - high) : T(0);
}

template <class T>
struct Split {
    alignas(32) T high[SLAB], low[SLAB];

    INLINE void set(const double* lse, int64_t count) {
        for (int64_t j = 0; j < SLAB; ++j) {
            const double value = j < count ? lse[j] : 0;
            high[j] = T(value);
            low[j] = rest<T>(value);
        }
    }
};

template <class T>
INLINE Vector<T> exponential_less(Vector<T> logits, T high, T low) {
    return exponential<T>((logits - high) - low);
}

template <class T>
INLINE Vector<T> exponential_less(Vector<T> logits, const Split<T>& lse, int64_t j) {
    return exponential<T>((logits - load(lse.high + j)) - load(lse.low + j));
}

// Which of the lanes from column j on is the row's own text.
template <class T>
INLINE Integer<T> own_lane(int64_t own, int64_t j) {
    return first_lanes<T>(own - j + 1) & ~first_lanes<T>(own - j);
}

template <class T>
double gradient_slab(const Slab<T>& slab, const double* row_lse, const double* column_lse, T row_weight,
                     T column_weight) {
    Split<T> columns;
    columns.set(column_lse, slab.columns);
    const T own_weight = row_weight + column_weight;
    double total = 0;
    for (int64_t i = 0; i < slab.rows; ++i) {
        T* row = slab.products + i * slab.stride;
        const T high = T(row_lse[i]), low = rest<T>(row_lse[i]);
        const int64_t own = slab.own + i;
        Vector<T> along = fill(T(0));
        across<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<T> product = load(row + j);
            const Vector<T> logits = product * slab.scale;
            Vector<T> gradient = row_weight * exponential_less<T>(logits, high, low) +
                                 column_weight * exponential_less<T>(logits, columns, j);
            if (own >= j && own < j + WIDTH<T>) gradient -= own_lane<T>(own, j) ? fill(own_weight) : fill(T(0));
            Vector<T> share = gradient * product;
            if (lanes < WIDTH<T>) {
                share = first_lanes<T>(lanes) ? share : fill(T(0));
                store(row + j, gradient, lanes);
            } else {
                store(row + j, gradient);
            }
            along += share;
        });
        total += sum<T>(along);
    }
    return total;
}

// Adds to sums[0..2].
template <bool GRADIENT, class T>
void sigmoid_slab(const Slab<T>& slab, T bias, double* sums) {
    for (int64_t i = 0; i < slab.rows; ++i) {
        T* row = slab.products + i * slab.stride;
        const int64_t own = slab.own + i;
        Vector<T> losses = fill(T(0)), shares = fill(T(0)), gradients = fill(T(0));
        across<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<T> product = load(row + j);
            const Vector<T> logits = product * slab.scale + bias;
            // y = -z L: the loss is log(1 + exp y), its derivative by L is -z / (1 + exp(-y)).
            Vector<T> y = logits;
            const bool has_own = own >= j && own < j + WIDTH<T>;
            if (has_own) y = own_lane<T>(own, j) ? -y : y;
            const Vector<T> u = exponential<T>(y > 0 ? -y : y);  // exp(-|y|)
            Vector<T> loss = (y > 0 ? y : y * 0) + log_one_plus<T>(u);
            Vector<T> gradient = (y > 0 ? fill(T(1)) : u) / (u + 1);
            if (has_own) gradient = own_lane<T>(own, j) ? -gradient : gradient;
            if (lanes < WIDTH<T>) {
                loss = first_lanes<T>(lanes) ? loss : fill(T(0));
                gradient = first_lanes<T>(lanes) ? gradient : fill(T(0));
            }
            losses += loss;
            if (!GRADIENT) return;
            gradients += gradient;
            if (lanes < WIDTH<T>) {
                shares += first_lanes<T>(lanes) ? gradient * product : fill(T(0));
                store(row + j, gradient, lanes);
            } else {
                shares += gradient * product;
                store(row + j, gradient);
            }
        });
        sums[0] += sum<T>(losses);
        sums[1] += sum<T>(shares);
        sums[2] += sum<T>(gradients);
    }
}

// Adds to sums[0..1]. `alike` as slab.products.
template <bool GRADIENT, class T>
void soft_slab(const Slab<T>& slab, const T* alike, const double* row_lse, const double* column_lse,
               const double* alike_row_lse, const double* alike_column_lse, double* sums) {
    Split<T> columns, alike_columns;
    columns.set(column_lse, slab.columns);
    alike_columns.set(alike_column_lse, slab.columns);
    for (int64_t i = 0; i < slab.rows; ++i) {
        T* row = slab.products + i * slab.stride;
        const T* alike_row = alike + i * slab.stride;
        const T high = T(row_lse[i]), low = rest<T>(row_lse[i]);
        const T alike_high = T(alike_row_lse[i]), alike_low = rest<T>(alike_row_lse[i]);
        Vector<T> losses = fill(T(0)), shares = fill(T(0));
        across<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<T> product = load(row + j);
            const Vector<T> logits = product * slab.scale;
            const Vector<T> alike_logits = load(alike_row + j) * (slab.scale / 2);
            const Vector<T> along = (logits - high) - low;
            const Vector<T> down = (logits - load(columns.high + j)) - load(columns.low + j);
            const Vector<T> p = exponential_less<T>(alike_logits, alike_high, alike_low);
            const Vector<T> q = exponential_less<T>(alike_logits, alike_columns, j);
            Vector<T> loss = -(p * along + q * down);
            if (lanes < WIDTH<T>) loss = first_lanes<T>(lanes) ? loss : fill(T(0));
            losses += loss;
            if (!GRADIENT) return;
            const Vector<T> gradient = (exponential<T>(along) - p) + (exponential<T>(down) - q);
            Vector<T> share = gradient * product;
            if (lanes < WIDTH<T>) {
                share = first_lanes<T>(lanes) ? share : fill(T(0));
                store(row + j, gradient, lanes);
            } else {
                store(row + j, gradient);
            }
            shares += share;
        });
        sums[0] += sum<T>(losses);
        sums[1] += sum<T>(shares);
    }
}

#undef INLINE
#undef VECTOR_BYTES
