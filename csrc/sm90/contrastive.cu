// The contrastive losses on Hopper, with product and epilogue in one kernel (TMA, mbarrier, wgmma).
// contrastive.h has the interface, product_kernel.cuh the kernel, *_epilogue*.cuh what it does with a tile of
// products.
//
// These files also run on the CPU, in tests/csrc/test_sm90.py. All times below but the last line are
// computed.
//
// n images, M texts, width d:
//   FLOPs        2 n M d each for lse, gradient and sigmoid; torch's two products of a gradient: 4 n M d more
//   L2           (128 + 128) 2 d bytes per tile of 128 x 256: the other block multicasts half of the text
//   memory       the images once, the text once per 2048 rows: 2 d n + 2 d M n / 2048 bytes
//   written      lse: 4 n M / 256 + 4 n M / 64 bytes of partial sums, read once; otherwise 2 n M bytes
//   wgmma        16 d clocks per tile
//   epilogue     1024 clocks of exp2 per 64 x 256 products; about 760 (lse) or 1050 (gradient) instructions
//                per warp, counted in the machine code. Two consumers share a scheduler; each should mostly
//                run while the other one's wgmma does. Sigmoid: three such functions per element.
//
// H200 (132 multiprocessors, 790 TFLOP/s), n = M = 32768, ms, from an epilogue that is hidden entirely to one
// that is not hidden at all:
//                  d = 512        d = 1024
//   lse            1.4 to 1.7     2.8 to 3.1
//   gradient       1.4 to 1.8     2.8 to 3.2    (writing 2.1 GB: 0.45 of it)
//   torch's two    2.8 to 3.3     5.6 to 6.4
//   together       5.6 to 6.8     11.2 to 12.7  (target: 8 and 14)
//   measured       7.97           14.4          (2026-11-26; benchmarks/results/nvidia-h200.md)

#include "contrastive.h"

#include <sm90/launch.h>

#include <algorithm>

#include "sm90/clip_epilogue.cuh"
#include "sm90/product_kernel.cuh"
#include "sm90/reductions.cuh"
#include "sm90/sigmoid_epilogue.cuh"
#include "sm90/sum_epilogues.cuh"

namespace dalle2_fast::sm90 {

namespace {

static_assert(sizeof(SharedStorage) <= 227 * 1024, "more than the shared memory of a block");

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

TileGrid grid_of(int64_t rows, const Features& features) {
    TileGrid grid;
    grid.rows = int(rows);
    grid.columns = int(features.columns);
    grid.stages_per_tile = int(round_up(features.width, STAGE_WIDTH) / STAGE_WIDTH);
    grid.row_tiles = int(round_up(rows, CLUSTER_BLOCKS * TILE_ROWS) / (CLUSTER_BLOCKS * TILE_ROWS));
    grid.column_tiles = int(round_up(features.columns, TILE_COLUMNS) / TILE_COLUMNS);
    return grid;
}

int64_t count_tiles(const TileGrid& grid) { return int64_t(grid.row_tiles) * grid.column_tiles; }
int64_t count_partials(const TileGrid& grid) {  // one per warp and tile
    return count_tiles(grid) * CLUSTER_BLOCKS * CONSUMERS * (WARPGROUP / 32);
}

// One product kernel, over rows [first, first + rows) of the image features and all text features.
template <class Element, class Epilogue>
void launch_products(const Features& features, int64_t first, int64_t rows,
                     const typename Epilogue::Arguments& arguments, void* stream) {
    bool bf16 = features.dtype == DType::bf16;
    const char* image = static_cast<const char*>(features.image) + first * features.image_stride * 2;
    TensorMap image_map =
        make_tensor_map(image, bf16, rows, features.width, features.image_stride, TILE_ROWS);
    TensorMap text_map = make_tensor_map(features.text, bf16, features.columns, features.width,
                                         features.text_stride, TILE_COLUMNS / CLUSTER_BLOCKS);
    TileGrid grid = grid_of(rows, features);
    launch_clusters(product_kernel<Element, Epilogue>, count_tiles(grid), CLUSTER_BLOCKS, THREADS,
                    sizeof(SharedStorage), stream, image_map, text_map, grid, arguments);
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, int64_t blocks, int threads, void* stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of a reduction");
}

// The log-sum-exps are computed for a chunk of rows at a time, so that its partial sums stay within
// PARTIAL_BYTES.
struct ChunkPlan {
    int64_t chunk;                  // rows
    int64_t row_sums, column_sums;  // number of sums, and as many maxima
    int64_t bytes;

    ChunkPlan(int64_t rows, int64_t columns) {
        int64_t tiles = round_up(columns, TILE_COLUMNS) / TILE_COLUMNS;
        // The sums and maxima of a row, and its part of those of CONSUMER_ROWS rows.
        double bytes_per_row = 2.0 * sizeof(float) * (double(tiles) + double(columns) / CONSUMER_ROWS);
        int64_t unit = CLUSTER_BLOCKS * TILE_ROWS;
        int64_t limit = int64_t(double(PARTIAL_BYTES) / bytes_per_row) / unit * unit;
        if (limit > BAND * unit) limit = limit / (BAND * unit) * (BAND * unit);
        limit = std::max(limit, unit);
        int64_t chunks = (rows + limit - 1) / limit;
        chunk = std::min(round_up((rows + chunks - 1) / chunks, unit), limit);
        chunk = std::min(chunk, rows);
        row_sums = tiles * chunk;
        column_sums = round_up(chunk, CONSUMER_ROWS) / CONSUMER_ROWS * columns;
        bytes = 256 + 2 * columns * int64_t(sizeof(double)) +
                2 * (row_sums + column_sums) * int64_t(sizeof(float));
    }
};

template <class Element>
void run_lse(const Features& features, const float* scale, double* row_lse, double* column_lse,
             float* positive_products, void* workspace, void* stream) {
    ChunkPlan plan(features.rows, features.columns);
    char* next = static_cast<char*>(workspace);
    int* out_of_range = reinterpret_cast<int*>(next);
    double* column_total = reinterpret_cast<double*>(next + 256);
    double* column_maximum = column_total + features.columns;
    float* row_sums = reinterpret_cast<float*>(column_maximum + features.columns);
    float* row_maxima = row_sums + plan.row_sums;
    float* column_sums = row_maxima + plan.row_sums;
    float* column_maxima = column_sums + plan.column_sums;
    check(cudaMemsetAsync(out_of_range, 0, sizeof(int), static_cast<cudaStream_t>(stream)),
          "clearing a flag");

    auto pass = [&](bool about_maximum) {
        for (int64_t first = 0; first < features.rows; first += plan.chunk) {
            int64_t rows = std::min(plan.chunk, features.rows - first);
            Mask mask = {int(rows), int(features.columns), features.diagonal_offset + first};
            if (about_maximum) {
                launch_products<Element, SumAboutMaximumEpilogue>(
                    features, first, rows,
                    {mask, scale, out_of_range, row_sums, row_maxima, column_sums, column_maxima}, stream);
            } else {
                launch_products<Element, SumEpilogue>(
                    features, first, rows, {mask, scale, positive_products + first, row_sums, column_sums},
                    stream);
            }
            LseReduction reduction = {
                mask,              scale,          first,      first + rows, first + rows == features.rows,
                positive_products, row_sums,       row_maxima, column_sums,  column_maxima,
                column_total,      column_maximum, row_lse,    column_lse,   out_of_range};
            int64_t row_blocks = round_up(rows, 128) / 128,
                    column_blocks = round_up(features.columns, 128) / 128;
            launch(about_maximum ? reduce_rows<true> : reduce_rows<false>, row_blocks, 128, stream,
                   reduction);
            launch(about_maximum ? reduce_columns<true> : reduce_columns<false>, column_blocks, 128, stream,
                   reduction);
        }
    };
    pass(false);
    pass(true);  // its kernels return at once unless the flag is set
}

template <class Element>
void run_gradient(const Features& features, const float* scale, const double* row_lse,
                  const double* column_lse, float row_weight, float column_weight, void* gradient,
                  int64_t gradient_stride, double* sums, void* workspace, void* stream) {
    int rows = int(features.rows), columns = int(features.columns);
    float* partials = static_cast<float*>(workspace);
    launch_products<Element, ClipEpilogue<Element>>(
        features, 0, features.rows,
        {{rows, columns, features.diagonal_offset},
         scale,
         row_lse,
         column_lse,
         row_weight,
         column_weight,
         {static_cast<Element*>(gradient), gradient_stride, rows, columns},
         partials},
        stream);
    launch(add_partials, 1, SUM_THREADS, stream, static_cast<const float*>(partials),
           count_partials(grid_of(features.rows, features)), sums);
}

template <class Element>
void run_sigmoid(const Features& features, const float* scale, const float* bias, void* gradient,
                 int64_t gradient_stride, double* sums, void* workspace, void* stream) {
    int rows = int(features.rows), columns = int(features.columns);
    int64_t count = count_partials(grid_of(features.rows, features));
    float* partials = static_cast<float*>(workspace);
    launch_products<Element, SigmoidEpilogue<Element>>(
        features, 0, features.rows,
        {{rows, columns, features.diagonal_offset},
         scale,
         bias,
         {static_cast<Element*>(gradient), gradient_stride, rows, columns},
         partials,
         partials + count,
         partials + 2 * count},
        stream);
    launch(add_partials, 3, SUM_THREADS, stream, static_cast<const float*>(partials), count, sums);
}

}  // namespace

const char* why_unavailable(const Features& features) {
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
        return "TMA needs features that begin, and whose rows are apart, at multiples of 16 bytes";
    if (features.image_stride < features.width || features.text_stride < features.width)
        return "the rows of features overlap";
    return why_device_unavailable();
}

int64_t workspace_bytes(int64_t rows, int64_t columns, int64_t width) {
    Features features = {};
    features.columns = columns;
    features.width = width;
    int64_t partials = 3 * count_partials(grid_of(rows, features)) * int64_t(sizeof(float));
    return std::max(ChunkPlan(rows, columns).bytes, partials);
}

void lse(const Features& features, const float* scale, double* row_lse, double* column_lse,
         float* positive_products, void* workspace, void* stream) {
    auto run = features.dtype == DType::bf16 ? run_lse<__nv_bfloat16> : run_lse<__half>;
    run(features, scale, row_lse, column_lse, positive_products, workspace, stream);
}

void gradient(const Features& features, const float* scale, const double* row_lse, const double* column_lse,
              float row_weight, float column_weight, void* gradient, int64_t gradient_stride, double* sums,
              void* workspace, void* stream) {
    auto run = features.dtype == DType::bf16 ? run_gradient<__nv_bfloat16> : run_gradient<__half>;
    run(features, scale, row_lse, column_lse, row_weight, column_weight, gradient, gradient_stride, sums,
        workspace, stream);
}

void sigmoid(const Features& features, const float* scale, const float* bias, void* gradient,
             int64_t gradient_stride, double* sums, void* workspace, void* stream) {
    auto run = features.dtype == DType::bf16 ? run_sigmoid<__nv_bfloat16> : run_sigmoid<__half>;
    run(features, scale, bias, gradient, gradient_stride, sums, workspace, stream);
}

}  // namespace dalle2_fast::sm90
