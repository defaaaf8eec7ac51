// Products of float32 matrices that lie in the caches, in registers. Like cpu/simd/vector.h, which comes first, this is
// included once per instruction set; the including file allows the compiler to round a product and a sum once.

// out[ROWS, COLUMNS vectors] = a[ROWS, depth] b[depth, COLUMNS vectors], in registers.
template <int ROWS, int COLUMNS>
INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                           float* out, int64_t out_stride) {
    Vector<float> sums[ROWS][COLUMNS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector<float> right[COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) right[j] = load(b + k * b_stride + j * WIDTH<float>);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Vector<float> left = fill(a[i * a_stride + k]);
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) store(out + i * out_stride + j * WIDTH<float>, sums[i][j]);
}

// Fetches part `part` of `parts` of an array into the L2 cache, while the caller computes.
INLINE void fetch_part(const float* from, int64_t count, int64_t part, int64_t parts) {
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// out[rows, width] = a[rows, depth] b[depth, width] for a panel of 16, 32 or 48 columns; rows is a multiple of 8.
// The panel behind this one is fetched meanwhile.
INLINE void multiply_panel(const float* a, int64_t a_stride, const float* b, int64_t depth, int64_t rows,
                           int64_t width, float* out, int64_t out_stride) {
    constexpr int ROWS = VECTOR_BYTES == 64 ? 8 : 4;  // 24 of 32 or 12 of 16 registers are sums
    for (int64_t i = 0; i < rows; i += ROWS) {
        fetch_part(b + depth * width, depth * width, i / ROWS, rows / ROWS);
        for (int64_t j = 0; j < width;) {
            const int64_t vectors = (width - j) / WIDTH<float>;
            const float* from = a + i * a_stride;
            float* to = out + i * out_stride + j;
            if (vectors >= 3)
                multiply_block<ROWS, 3>(from, a_stride, b + j, width, depth, to, out_stride);
            else if (vectors == 2)
                multiply_block<ROWS, 2>(from, a_stride, b + j, width, depth, to, out_stride);
            else
                multiply_block<ROWS, 1>(from, a_stride, b + j, width, depth, to, out_stride);
            j += (vectors >= 3 ? 3 : vectors) * WIDTH<float>;
        }
    }
}
