// M2: the contrastive losses on Hopper, product and epilogue in one kernel (TMA, mbarrier, wgmma).
// contrastive.h has the interface, contrastive_sm90.cuh the kernels.
//
// Its text also runs on the CPU, in tests/csrc/test_sm90.py. The times below are computed, but for the last line.
//
// n images, M texts, width d:
//   FLOPs        2 n M d each for lse, gradient, sigmoid; torch's two products of a gradient: 4 n M d more
//   L2           (128 + 128) 2 d bytes a tile of 128 x 256: half the text comes with the other block's
//   memory       the images once, the text once for every 2048 rows: 2 d n + 2 d M n / 2048 bytes
//   written      lse: 4 n M / 256 + 4 n M / 64 bytes of partial sums, read once; else 2 n M bytes
//   wgmma        16 d clocks a tile
//   epilogue     1024 clocks of exp2 a group of 64 x 256; about 760 (lse) or 1050 (gradient) instructions a
//                warp, counted in the machine code. Two groups share a scheduler; each should mostly run
//                beside the other's wgmma. Sigmoid: three such functions an element.
//
// H200 (132 multiprocessors, 790 TFLOP/s), n = M = 32768, ms, from all of the epilogue hidden to none:
//                  d = 512        d = 1024
//   lse            1.4 to 1.7     2.8 to 3.1
//   gradient       1.4 to 1.8     2.8 to 3.2    (writing 2.1 GB: 0.45 of it)
//   torch's two    2.8 to 3.3     5.6 to 6.4
//   together       5.6 to 6.8     11.2 to 12.7  (wanted: 8 and 14)
//   measured       7.97           14.4          (2026-11-26; benchmarks/results/nvidia-h200.md)
#include "contrastive_sm90.cuh"

#include <algorithm>

#include "contrastive.h"

namespace dalle2_fast::sm90 {

namespace {

static_assert(sizeof(Shared) <= 227 * 1024, "a block's shared memory");

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

Extent extent_of(int64_t rows, const Features& features) {
    Extent extent;
    extent.rows = int(rows);
    extent.columns = int(features.columns);
    extent.steps = int(round_up(features.width, WIDTH) / WIDTH);
    extent.row_tiles = int(round_up(rows, BLOCKS * ROWS) / (BLOCKS * ROWS));
    extent.column_tiles = int(round_up(features.columns, COLUMNS) / COLUMNS);
    return extent;
}

int64_t tiles_of(const Extent& extent) { return int64_t(extent.row_tiles) * extent.column_tiles; }
int64_t shares_of(const Extent& extent) { return tiles_of(extent) * BLOCKS * GROUPS * (WARPGROUP / 32); }

// One kernel over rows [first, first + rows) of the image features and all text features.
template <class Element, class Epilogue>
void multiply_features(const Features& features, int64_t first, int64_t rows,
                       const typename Epilogue::Arguments& arguments, void* stream) {
    bool bf16 = features.dtype == DType::bf16;
    const char* image = static_cast<const char*>(features.image) + first * features.image_stride * 2;
    TensorMap image_map = tensor_map(image, bf16, rows, features.width, features.image_stride, ROWS);
    TensorMap text_map = tensor_map(features.text, bf16, features.columns, features.width,
                                    features.text_stride, COLUMNS / BLOCKS);
    Extent extent = extent_of(rows, features);
    launch_clusters(product_kernel<Element, Epilogue>, tiles_of(extent), BLOCKS, THREADS, sizeof(Shared),
                    stream, image_map, text_map, extent, arguments);
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, int64_t blocks, int threads, void* stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of a reduction");
}

// Rows are done in chunks, so that the partial sums of a chunk stay within PARTIAL_BYTES.
struct Plan {
    int64_t chunk;                  // rows
    int64_t row_sums, column_sums;  // numbers in each, and as many maxima
    int64_t bytes;

    Plan(int64_t rows, int64_t columns) {
        int64_t tiles = round_up(columns, COLUMNS) / COLUMNS;
        // Bytes of a row's sums and maxima, and of its part in those of 64 rows.
        double bytes_per_row = 2.0 * sizeof(float) * (double(tiles) + double(columns) / GROUP_ROWS);
        int64_t unit = BLOCKS * ROWS, most = int64_t(double(PARTIAL_BYTES) / bytes_per_row) / unit * unit;
        if (most > BAND * unit) most = most / (BAND * unit) * (BAND * unit);
        most = std::max(most, unit);
        int64_t chunks = (rows + most - 1) / most;
        chunk = std::min(round_up((rows + chunks - 1) / chunks, unit), most);
        chunk = std::min(chunk, rows);
        row_sums = tiles * chunk;
        column_sums = round_up(chunk, GROUP_ROWS) / GROUP_ROWS * columns;
        bytes = 256 + 2 * columns * int64_t(sizeof(double)) +
                2 * (row_sums + column_sums) * int64_t(sizeof(float));
    }
};

template <class Element>
void sum_exponentials(const Features& features, const float* scale, double* row_lse, double* column_lse,
                      float* own_products, void* workspace, void* stream) {
    Plan plan(features.rows, features.columns);
    char* next = static_cast<char*>(workspace);
    int* needed = reinterpret_cast<int*>(next);
    double* column_total = reinterpret_cast<double*>(next + 256);
    double* column_maximum = column_total + features.columns;
    float* row_sums = reinterpret_cast<float*>(column_maximum + features.columns);
    float* row_maxima = row_sums + plan.row_sums;
    float* column_sums = row_maxima + plan.row_sums;
    float* column_maxima = column_sums + plan.column_sums;
    check(cudaMemsetAsync(needed, 0, sizeof(int), static_cast<cudaStream_t>(stream)), "clearing a flag");

    auto pass = [&](bool about_maximum) {
        for (int64_t first = 0; first < features.rows; first += plan.chunk) {
            int64_t rows = std::min(plan.chunk, features.rows - first);
            Pairs pairs = {int(rows), int(features.columns), features.own + first};
            if (about_maximum) {
                multiply_features<Element, SumsAboutMaximum>(
                    features, first, rows,
                    {pairs, scale, needed, row_sums, row_maxima, column_sums, column_maxima}, stream);
            } else {
                multiply_features<Element, Sums>(features, first, rows,
                                                 {pairs, scale, own_products + first, row_sums, column_sums},
                                                 stream);
            }
            Reduction reduction = {
                pairs,        scale,          first,      first + rows, first + rows == features.rows,
                own_products, row_sums,       row_maxima, column_sums,  column_maxima,
                column_total, column_maximum, row_lse,    column_lse,   needed};
            int64_t row_blocks = round_up(rows, 128) / 128,
                    column_blocks = round_up(features.columns, 128) / 128;
            launch(about_maximum ? reduce_rows<true> : reduce_rows<false>, row_blocks, 128, stream,
                   reduction);
            launch(about_maximum ? reduce_columns<true> : reduce_columns<false>, column_blocks, 128, stream,
                   reduction);
        }
    };
    pass(false);
    pass(true);  // its kernels leave at once where the flag is not set
}

template <class Element>
void gradient_of(const Features& features, const float* scale, const double* row_lse,
                 const double* column_lse, float row_weight, float column_weight, void* gradient,
                 int64_t gradient_stride, double* sums, void* workspace, void* stream) {
    int rows = int(features.rows), columns = int(features.columns);
    float* shares = static_cast<float*>(workspace);
    multiply_features<Element, Gradient<Element>>(
        features, 0, features.rows,
        {{rows, columns, features.own},
         scale,
         row_lse,
         column_lse,
         row_weight,
         column_weight,
         {static_cast<Element*>(gradient), gradient_stride, rows, columns},
         shares},
        stream);
    launch(add_shares, 1, SUM_THREADS, stream, static_cast<const float*>(shares),
           shares_of(extent_of(features.rows, features)), sums);
}

template <class Element>
void sigmoid_of(const Features& features, const float* scale, const float* bias, void* gradient,
                int64_t gradient_stride, double* sums, void* workspace, void* stream) {
    int rows = int(features.rows), columns = int(features.columns);
    int64_t count = shares_of(extent_of(features.rows, features));
    float* shares = static_cast<float*>(workspace);
    multiply_features<Element, Sigmoid<Element>>(
        features, 0, features.rows,
        {{rows, columns, features.own},
         scale,
         bias,
         {static_cast<Element*>(gradient), gradient_stride, rows, columns},
         shares,
         shares + count,
         shares + 2 * count},
        stream);
    launch(add_shares, 3, SUM_THREADS, stream, static_cast<const float*>(shares), count, sums);
}

}  // namespace

const char* obstacle(const Features& features) {
    auto aligned = [](const void* matrix, int64_t stride) {
        return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride % 8 == 0;
    };
    constexpr int64_t LIMIT = int64_t(1) << 30;  // of rows and columns: coordinates are int
    if (features.dtype != DType::bf16 && features.dtype != DType::f16)
        return "wgmma multiplies bfloat16 and float16 here";
    if (features.rows < 1 || features.columns < 1 || features.width < 1) return "there are no features";
    if (features.rows > LIMIT || features.columns > LIMIT || features.width > LIMIT)
        return "there are more than 2^30 rows, columns or features";
    if (!aligned(features.image, features.image_stride) || !aligned(features.text, features.text_stride))
        return "the copy engine needs features that begin, and rows that are apart, at multiples of 16 bytes";
    if (features.image_stride < features.width || features.text_stride < features.width)
        return "the rows of features overlap";
    return device_obstacle();
}

int64_t workspace_bytes(int64_t rows, int64_t columns, int64_t width) {
    Features features = {};
    features.columns = columns;
    features.width = width;
    int64_t shares = 3 * shares_of(extent_of(rows, features)) * int64_t(sizeof(float));
    return std::max(Plan(rows, columns).bytes, shares);
}

void lse(const Features& features, const float* scale, double* row_lse, double* column_lse,
         float* own_products, void* workspace, void* stream) {
    auto run = features.dtype == DType::bf16 ? sum_exponentials<__nv_bfloat16> : sum_exponentials<__half>;
    run(features, scale, row_lse, column_lse, own_products, workspace, stream);
}

void gradient(const Features& features, const float* scale, const double* row_lse, const double* column_lse,
              float row_weight, float column_weight, void* gradient, int64_t gradient_stride, double* sums,
              void* workspace, void* stream) {
    auto run = features.dtype == DType::bf16 ? gradient_of<__nv_bfloat16> : gradient_of<__half>;
    run(features, scale, row_lse, column_lse, row_weight, column_weight, gradient, gradient_stride, sums,
        workspace, stream);
}

void sigmoid(const Features& features, const float* scale, const float* bias, void* gradient,
             int64_t gradient_stride, double* sums, void* workspace, void* stream) {
    auto run = features.dtype == DType::bf16 ? sigmoid_of<__nv_bfloat16> : sigmoid_of<__half>;
    run(features, scale, bias, gradient, gradient_stride, sums, workspace, stream);
}

}  // namespace dalle2_fast::sm90
