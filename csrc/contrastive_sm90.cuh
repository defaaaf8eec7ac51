// The kernels of contrastive_sm90.cu: a tile of products of features, and what is made of it in registers.
//
// A cluster of two blocks computes 256 x 256 products, each block 128 x 256. In a block one warpgroup copies
// (one thread does), two multiply, 64 rows each ("group"). Both blocks need the same 256 rows of text: each
// copies half of them to both. Every block stays and takes tile after tile; copies run ahead into the next
// tile while the sums of this one are evaluated. The groups never wait for each other, and the second starts
// late by as much as the stages allow: one multiplies while the other evaluates.
#pragma once

#include <sm90_hardware.h>

#include <cmath>
#include <cstdint>

namespace dalle2_fast::sm90 {

constexpr int GROUPS = 2, GROUP_ROWS = 64;  // multiplying warpgroups and the rows of each
constexpr int ROWS = GROUPS * GROUP_ROWS;   // of a block's tile
constexpr int COLUMNS = 256;                // of a block's tile, and of the cluster's
constexpr int BLOCKS = 2;                   // of a cluster, one below the other
constexpr int WIDTH = 64;                   // of features in a stage: 128 bytes, what the swizzle spans
constexpr int STEP = 16;                    // of width in one instruction
constexpr int STAGES = 4;                   // 48 KB each
constexpr int WARPGROUP = 128;
constexpr int THREADS = (1 + GROUPS) * WARPGROUP;
constexpr int ROW_BYTES = WIDTH * 2;
constexpr int BAND = 8;  // clusters' tiles below each other before the next column: L2
constexpr int COPY_REGISTERS = 24, MULTIPLY_REGISTERS = 240;  // 128 * (24 + 2 * 240) <= 65536
constexpr float LOG2E = 1.44269504f;

// What the warps of a group tell each other; by turns, so that a barrier a tile is enough.
using Exchange = float[2][GROUPS][2 * 4 * COLUMNS];

struct Shared {
    unsigned char image[STAGES][ROWS * ROW_BYTES];
    unsigned char text[STAGES][COLUMNS * ROW_BYTES];
    Exchange exchange;
    uint64_t full[STAGES], empty[STAGES];
};

struct Extent {
    int rows, columns, steps;     // steps of WIDTH
    int row_tiles, column_tiles;  // of a cluster
};

struct Place {
    int row_tile, column_tile;
};

// Tile after tile down a band of BAND rows of tiles, then the next column: a band's image rows (2 MB at width
// 512) stay in L2, and the text is read from memory once a band.
__device__ __forceinline__ Place place_of(int64_t tile, const Extent& extent) {
    int64_t of_band = int64_t(BAND) * extent.column_tiles;
    int band = int(tile / of_band), first = band * BAND;
    int height = extent.row_tiles - first < BAND ? extent.row_tiles - first : BAND;
    int within = int(tile - band * of_band);
    return {first + within % height, within / height};
}

struct Stage {  // which one, and the parity of its phase
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++index == STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

// The group's part of a tile.
struct Spot {
    int row, column;  // of its first product
    int column_tile;
    int turn;      // 0, 1, 0, ...
    int64_t slot;  // one number for every group of every tile
};

__device__ __forceinline__ int group_of_thread() { return int(threadIdx.x) / WARPGROUP - 1; }
__device__ __forceinline__ int thread_of_group() { return int(threadIdx.x) % WARPGROUP; }
__device__ __forceinline__ int lane_of_warp() { return int(threadIdx.x) % 32; }
// Where a thread's numbers are in the group's 64 x 256: number 4 j + 2 h + b is at (row_in_group(h),
// column_in_tile(j, b)); see sm90_hardware.h.
__device__ __forceinline__ int row_in_group(int half) {
    return thread_of_group() / 32 * 16 + lane_of_warp() / 4 + 8 * half;
}
__device__ __forceinline__ int column_in_tile(int block, int bit) {
    return 8 * block + 2 * (lane_of_warp() % 4) + bit;
}

// --------------------------------------------------------------------------------------------- the main loop

__device__ __forceinline__ void copy_tiles(Shared& shared, const TensorMap& image, const TensorMap& text,
                                           const Extent& extent) {
    int rank = int(cluster_rank());
    int64_t tiles = int64_t(extent.row_tiles) * extent.column_tiles;
    Stage stage;
    for (int64_t tile = blockIdx.x / BLOCKS; tile < tiles; tile += gridDim.x / BLOCKS) {
        Place place = place_of(tile, extent);
        int row = (place.row_tile * BLOCKS + rank) * ROWS;
        int part = rank * (COLUMNS / BLOCKS);  // of the text
        int column = place.column_tile * COLUMNS + part;
#pragma unroll 1
        for (int step = 0; step < extent.steps; ++step) {
            barrier_wait(&shared.empty[stage.index],
                         stage.parity ^ 1);  // in both blocks: the text goes to both
            barrier_announce(&shared.full[stage.index], (ROWS + COLUMNS) * ROW_BYTES);
            copy_box(image, shared.image[stage.index], &shared.full[stage.index], step * WIDTH, row);
            copy_box_to_all(text, &shared.text[stage.index][part * ROW_BYTES], &shared.full[stage.index],
                            step * WIDTH, column, (1 << BLOCKS) - 1);
            stage.next();
        }
    }
}

// A warp has done with the stage's features; both blocks must know, because both write to them.
__device__ __forceinline__ void leave(Shared& shared, int index) {
    int lane = lane_of_warp();
    if (lane < BLOCKS) barrier_arrive(&shared.empty[index], lane);
}

template <class Element>
__device__ __forceinline__ void multiply_tile(Shared& shared, Stage& stage, int steps, bool first,
                                              float (&products)[FRAGMENT]) {
    constexpr int OTHERS_START = GROUPS + 1;  // the barrier's number: 1 and 2 are the groups' own
    int group = group_of_thread();
    int previous = 0;
    if (first && group == 1) named_sync(OTHERS_START, GROUPS * WARPGROUP);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        barrier_wait(&shared.full[stage.index], stage.parity);
        uint64_t rows = matrix_descriptor(&shared.image[stage.index][group * GROUP_ROWS * ROW_BYTES]);
        uint64_t columns = matrix_descriptor(shared.text[stage.index]);
        multiply_border(products);
        multiply_begin();
#pragma unroll
        for (int part = 0; part < WIDTH / STEP; ++part) {
            uint64_t skip = part * STEP * 2 / 16;  // a descriptor counts 16 bytes
            multiply<Element>(products, rows + skip, columns + skip, step + part > 0);
        }
        multiply_commit();
        multiply_border(products);
        // One product is always queued behind the one that runs.
        multiply_wait<1>();
        if (step > 0) leave(shared, previous);
        // Its partner starts once this group has all but one of the stages behind it.
        if (first && group == 0 && step == (steps < STAGES - 1 ? steps : STAGES - 1) - 1)
            named_arrive(OTHERS_START, GROUPS * WARPGROUP);
        previous = stage.index;
        stage.next();
    }
    multiply_wait<0>();
    multiply_border(products);
    leave(shared, previous);
}

// An epilogue is constructed once, begins and finishes each tile; its Arguments say where its results go.
template <class Element, class Epilogue>
__global__ void __launch_bounds__(THREADS, 1)
    product_kernel(const __grid_constant__ TensorMap image, const __grid_constant__ TensorMap text,
                   const __grid_constant__ Extent extent,
                   const __grid_constant__ typename Epilogue::Arguments arguments) {
    if (!Epilogue::wanted(arguments)) return;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&shared.full[stage], 1);
            barrier_init(&shared.empty[stage], BLOCKS * GROUPS * (WARPGROUP / 32));
        }
        barrier_init_done();
    }
    cluster_sync();
    if (threadIdx.x < WARPGROUP) {
        give_up_registers<COPY_REGISTERS>();
        if (threadIdx.x == 0) copy_tiles(shared, image, text, extent);
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        int group = group_of_thread(), rank = int(cluster_rank());
        int64_t tiles = int64_t(extent.row_tiles) * extent.column_tiles, first = blockIdx.x / BLOCKS;
        Epilogue epilogue(arguments, shared.exchange);
        Stage stage;
        int turn = 0;
        for (int64_t tile = first; tile < tiles; tile += gridDim.x / BLOCKS, turn ^= 1) {
            Place place = place_of(tile, extent);
            Spot spot;
            spot.row = ((place.row_tile * BLOCKS + rank) * GROUPS + group) * GROUP_ROWS;
            spot.column = place.column_tile * COLUMNS;
            spot.column_tile = place.column_tile;
            spot.turn = turn;
            spot.slot = (tile * BLOCKS + rank) * GROUPS + group;
            float products[FRAGMENT];
            epilogue.begin(spot);
            multiply_tile<Element>(shared, stage, extent.steps, tile == first, products);
            epilogue.finish(spot, products);
        }
    }
    cluster_sync();  // the partner may still write here, or arrive at a barrier
}

// ---------------------------------------------------------------------------------- what the epilogues share

struct Sum {
    __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};
struct Maximum {
    __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// Over the four lanes that hold a row.
template <class Operation>
__device__ __forceinline__ float over_row(float value, Operation operation) {
    value = operation(value, __shfl_xor_sync(~0u, value, 1));
    return operation(value, __shfl_xor_sync(~0u, value, 2));
}

// Half the lanes that share a column keep the first half of the values, the others the second, summed over
// both.
template <int KEPT>
__device__ __forceinline__ void halve(float (&values)[16]) {
    bool upper = lane_of_warp() & 2 * KEPT;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        float given = upper ? values[i] : values[i + KEPT];
        float mine = upper ? values[i + KEPT] : values[i];
        values[i] = mine + __shfl_xor_sync(~0u, given, 2 * KEPT);
    }
}
// values[2 i + b], i < 8, are of the columns column_in_tile(8 part + i, b). Sums over the eight lanes that
// hold a column; a lane is left with columns 64 part + 2 lane + {0, 1}, in values[0] and [1].
__device__ __forceinline__ void over_columns(float (&values)[16]) {
    halve<8>(values);
    halve<4>(values);
    halve<2>(values);
}

struct Pairs {  // which products there are, and which are of a row with its own text
    int rows, columns;
    int64_t own;  // column of row 0's own text

    // Does the group's part have an edge of the matrix or an own pair in it? Few have.
    __device__ __forceinline__ bool special(const Spot& spot) const {
        int64_t own_first = spot.row + own - spot.column;
        return spot.row + GROUP_ROWS > rows || spot.column + COLUMNS > columns ||
               (own_first < COLUMNS && own_first + GROUP_ROWS > 0);
    }
    // Column in the tile of this thread's own pair, -1 if it has none.
    __device__ __forceinline__ int own_column(const Spot& spot, int half) const {
        int row = spot.row + row_in_group(half);
        int64_t column = row + own, in_tile = column - spot.column;
        bool here = row < rows && column < columns && in_tile >= 0 && in_tile < COLUMNS &&
                    in_tile / 2 % 4 == lane_of_warp() % 4;
        return here ? int(in_tile) : -1;
    }
};

// The thread's number of row `half` in that column: a register has no index at run time.
__device__ __forceinline__ float pick(const float (&numbers)[FRAGMENT], int half, int column) {
    float found = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        if (column == column_in_tile(j, 0)) found = numbers[4 * j + 2 * half];
        if (column == column_in_tile(j, 1)) found = numbers[4 * j + 2 * half + 1];
    }
    return found;
}

// exp(L - shift) = 2^(scale log2(e) P - units): an integer, so that one multiply-add rounds once.
__host__ __device__ __forceinline__ float shift_units(float scale) {
    return rintf((fabsf(scale) - 70.0f) * LOG2E);
}

// --------------------------------------------------------------------------- sums of exponentials, one shift

// Own pairs are left out: the reductions add them in double, from own_products. An easy pair's exponential is
// many times the others' sum, and 1 - p of it would drown in the sum's rounding.
struct Sums {
    struct Arguments {
        Pairs pairs;
        const float* scale;
        float* own_products;  // [rows]
        float* row_sums;      // [column tiles, rows]
        float* column_sums;   // [groups of 64 rows, columns]
    };
    static __device__ __forceinline__ bool wanted(const Arguments&) { return true; }

    const Arguments& at;
    Exchange& exchange;
    float factor, units;

    __device__ __forceinline__ Sums(const Arguments& arguments, Exchange& exchange)
        : at(arguments), exchange(exchange) {
        factor = at.scale[0] * LOG2E;
        units = shift_units(at.scale[0]);
    }
    __device__ __forceinline__ void begin(const Spot&) {}
    __device__ __forceinline__ void finish(const Spot& spot, float (&products)[FRAGMENT]) {
        if (spot.row >= at.pairs.rows) return;  // all four warps
        if (at.pairs.special(spot)) reduce<true>(spot, products);
        else reduce<false>(spot, products);
    }

    template <bool SPECIAL>
    __device__ __forceinline__ void reduce(const Spot& spot, float (&products)[FRAGMENT]) {
        int group = group_of_thread(), thread = thread_of_group(), lane = lane_of_warp();
        float* mine = exchange[spot.turn][group];  // [4 warps, COLUMNS]
        int own[2] = {-1, -1};
        bool inside[2] = {true, true};
        if (SPECIAL) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = spot.row + row_in_group(half);
                inside[half] = row < at.pairs.rows;
                own[half] = at.pairs.own_column(spot, half);
                if (own[half] >= 0) at.own_products[row] = pick(products, half, own[half]);
            }
        }
        float row_sums[2] = {0, 0};
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            float column_sums[16], part_sums[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                int j = part * 8 + i / 2, column = column_in_tile(j, i % 2);
                float terms[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    terms[half] = fast_exp2(fmaf(products[4 * j + 2 * half + i % 2], factor, -units));
                    if (SPECIAL) {
                        bool counts =
                            inside[half] && spot.column + column < at.pairs.columns && column != own[half];
                        terms[half] = counts ? terms[half] : 0.0f;
                    }
                    part_sums[half] += terms[half];
                }
                column_sums[i] = terms[0] + terms[1];
            }
            over_columns(column_sums);
            mine[thread / 32 * COLUMNS + part * 64 + 2 * lane] = column_sums[0];
            mine[thread / 32 * COLUMNS + part * 64 + 2 * lane + 1] = column_sums[1];
            row_sums[0] += part_sums[0];
            row_sums[1] += part_sums[1];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = over_row(row_sums[half], Sum());
            int row = spot.row + row_in_group(half);
            if (lane % 4 == 0 && (!SPECIAL || inside[half]))
                at.row_sums[int64_t(spot.column_tile) * at.pairs.rows + row] = sum;
        }
        named_sync(1 + group, WARPGROUP);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int column = thread + i * WARPGROUP;
            float sum = (mine[column] + mine[COLUMNS + column]) +
                        (mine[2 * COLUMNS + column] + mine[3 * COLUMNS + column]);
            if (!SPECIAL || spot.column + column < at.pairs.columns)
                at.column_sums[int64_t(spot.row / GROUP_ROWS) * at.pairs.columns + spot.column + column] =
                    sum;
        }
    }
};

// -------------------------------------------------------------- sums of exponentials about their own maximum

// Only where the one shift has not served (un-normalised features, cosines below about -0.57 at scale 100).
struct SumsAboutMaximum {
    struct Arguments {
        Pairs pairs;
        const float* scale;
        const int* needed;
        float *row_sums, *row_maxima;        // [column tiles, rows]
        float *column_sums, *column_maxima;  // [groups of 64 rows, columns]
    };
    static __device__ __forceinline__ bool wanted(const Arguments& arguments) {
        return *arguments.needed != 0;
    }

    const Arguments& at;
    Exchange& exchange;

    __device__ __forceinline__ SumsAboutMaximum(const Arguments& arguments, Exchange& exchange)
        : at(arguments), exchange(exchange) {}
    __device__ __forceinline__ void begin(const Spot&) {}

    static __device__ __forceinline__ float finite(float maximum) {
        return maximum == -INFINITY ? 0.0f : maximum;
    }
    static __device__ __forceinline__ float term(float logit, float maximum) {
        return fast_exp2((logit - maximum) * LOG2E);
    }

    __device__ __forceinline__ void finish(const Spot& spot, float (&numbers)[FRAGMENT]) {
        if (spot.row >= at.pairs.rows) return;
        int group = group_of_thread(), thread = thread_of_group(), lane = lane_of_warp();
        float* sums = exchange[spot.turn][group];  // [4 warps, COLUMNS]
        float* maxima = sums + 4 * COLUMNS;
        float scale = at.scale[0];
        // Rounded, here as for the gradient: fused with what follows, logits of 3e5 are off by 0.02.
#pragma unroll
        for (int i = 0; i < FRAGMENT; ++i) numbers[i] = __fmul_rn(scale, numbers[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = spot.row + row_in_group(half), own = at.pairs.own_column(spot, half);
            float maximum = -INFINITY, sum = 0;
#pragma unroll
            for (int j = 0; j < 32; ++j) {
#pragma unroll
                for (int bit = 0; bit < 2; ++bit) {
                    int column = column_in_tile(j, bit);
                    bool counts =
                        row < at.pairs.rows && spot.column + column < at.pairs.columns && column != own;
                    float& number = numbers[4 * j + 2 * half + bit];
                    number = counts ? number : -INFINITY;
                    maximum = fmaxf(maximum, number);
                }
            }
            maximum = over_row(maximum, Maximum());
#pragma unroll
            for (int j = 0; j < 32; ++j)
                sum += term(numbers[4 * j + 2 * half], finite(maximum)) +
                       term(numbers[4 * j + 2 * half + 1], finite(maximum));
            sum = over_row(sum, Sum());
            if (lane % 4 == 0 && row < at.pairs.rows) {
                int64_t slot = int64_t(spot.column_tile) * at.pairs.rows + row;
                at.row_sums[slot] = sum;
                at.row_maxima[slot] = maximum;
            }
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            int j = i / 2, column = column_in_tile(j, i % 2);
            float upper = numbers[4 * j + i % 2], lower = numbers[4 * j + 2 + i % 2];
            float maximum = fmaxf(upper, lower);
#pragma unroll
            for (int bit = 4; bit <= 16; bit *= 2)
                maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, bit));
            float sum = term(upper, finite(maximum)) + term(lower, finite(maximum));
#pragma unroll
            for (int bit = 4; bit <= 16; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
            if (lane / 4 == j % 8) {
                sums[thread / 32 * COLUMNS + column] = sum;
                maxima[thread / 32 * COLUMNS + column] = maximum;
            }
        }
        named_sync(1 + group, WARPGROUP);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int column = thread + i * WARPGROUP;
            float maximum = -INFINITY, sum = 0;
#pragma unroll
            for (int warp = 0; warp < 4; ++warp) maximum = fmaxf(maximum, maxima[warp * COLUMNS + column]);
#pragma unroll
            for (int warp = 0; warp < 4; ++warp)
                sum += sums[warp * COLUMNS + column] * term(maxima[warp * COLUMNS + column], finite(maximum));
            if (spot.column + column < at.pairs.columns) {
                int64_t slot = int64_t(spot.row / GROUP_ROWS) * at.pairs.columns + spot.column + column;
                at.column_sums[slot] = sum;
                at.column_maxima[slot] = maximum;
            }
        }
    }
};

// --------------------------------------------------------------------------------------- gradients of logits

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 pair) {
    return *reinterpret_cast<uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t bits_of(__half2 pair) { return *reinterpret_cast<uint32_t*>(&pair); }
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    return bits_of(__floats2bfloat162_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    return bits_of(__floats2half2_rn(low, high));
}

template <class Element>
struct Output {
    Element* matrix;
    int64_t stride;
    int rows, columns;

    // Where the thread's first eight columns of a row are.
    __device__ __forceinline__ Element* place(const Spot& spot, int half) const {
        int64_t row = spot.row + row_in_group(half);
        return matrix + row * stride + spot.column + 8 * (lane_of_warp() % 4);
    }

    // pairs[i]: the thread's two numbers of row row_in_group(half), blocks 4 part + i. The four lanes of a
    // row exchange theirs, so that each has a whole block of eight to write.
    template <bool SPECIAL>
    __device__ __forceinline__ void write(const Spot& spot, int half, int part, Element* place,
                                          uint32_t (&pairs)[4]) const {
        int lane = lane_of_warp();
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            uint32_t got = __shfl_xor_sync(~0u, lane & 1 ? pairs[i] : pairs[i + 1], 1);
            pairs[i] = lane & 1 ? got : pairs[i];
            pairs[i + 1] = lane & 1 ? pairs[i + 1] : got;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t got = __shfl_xor_sync(~0u, lane & 2 ? pairs[i] : pairs[i + 2], 2);
            pairs[i] = lane & 2 ? got : pairs[i];
            pairs[i + 2] = lane & 2 ? pairs[i + 2] : got;
        }
        Element* to = place + 32 * part;
        int row = spot.row + row_in_group(half), column = spot.column + 8 * (4 * part + lane % 4);
        if (!SPECIAL || (row < rows && column + 8 <= columns)) {
            *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else if (row < rows) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                unsigned short number = static_cast<unsigned short>(pairs[i / 2] >> i % 2 * 16);
                if (column + i < columns) reinterpret_cast<unsigned short*>(to)[i] = number;
            }
        }
    }
};

// A warp's share of a sum over all products, to a place of its own.
__device__ __forceinline__ void write_share(float* shares, const Spot& spot, float value) {
#pragma unroll
    for (int bit = 16; bit >= 1; bit /= 2) value += __shfl_xor_sync(~0u, value, bit);
    if (lane_of_warp() == 0) shares[spot.slot * (WARPGROUP / 32) + thread_of_group() / 32] = value;
}

// G = row_weight exp(L - row_lse) + column_weight exp(L - column_lse) - (row_weight + column_weight) [own
// pair]. Where the group's lse are within reach of the shift, one exponential an element:
//   exp(L - row_lse) = exp(L - shift) exp(shift - row_lse)
template <class Element>
struct Gradient {
    struct Arguments {
        Pairs pairs;
        const float* scale;
        const double *row_lse, *column_lse;
        float row_weight, column_weight;
        Output<Element> output;
        float* shares;  // of the sum of G P; a number a warp of a tile
    };
    static __device__ __forceinline__ bool wanted(const Arguments&) { return true; }

    const Arguments& at;
    Exchange& exchange;
    float scale, units;
    float row_factor[2];
    bool within_reach;

    __device__ __forceinline__ Gradient(const Arguments& arguments, Exchange& exchange)
        : at(arguments), exchange(exchange) {
        scale = at.scale[0];
        units = shift_units(scale);
    }

    // Near it L - high is exact, where one float32 of an lse of 1e5 would be off by 0.004.
    struct Lse {
        float high, low;
    };
    static __device__ __forceinline__ Lse split(double lse) {
        float high = float(lse);
        return {high, lse - lse == 0 ? float(lse - high) : 0.0f};
    }
    static __device__ __forceinline__ float power_of(float logit, Lse lse) {
        return fast_exp2(((logit - lse.high) - lse.low) * LOG2E);
    }

    // factor = weight exp(shift - lse), and whether it and all exp(L - shift) are floats of full precision:
    // those lost below 2^-126 have to be nothing beside 2^-70 of the row, and 2^-122 is not yet subnormal.
    __device__ __forceinline__ void prepare(double lse, float weight, float& factor) {
        double above = lse * 1.4426950408889634 - double(units);
        within_reach = within_reach && above >= -70.0 && above <= 122.0;
        factor = weight * exp2f(float(-above));
    }
    __device__ __forceinline__ void begin(const Spot& spot) {
        float* factors = exchange[spot.turn][group_of_thread()];
        within_reach = true;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int column = thread_of_group() + i * WARPGROUP;
            float factor = 0;
            Lse lse = {INFINITY, 0};
            if (spot.column + column < at.pairs.columns) {
                double wide = at.column_lse[spot.column + column];
                lse = split(wide);
                prepare(wide, at.column_weight, factor);
            }
            factors[column] = factor;
            factors[COLUMNS + column] = lse.high;
            factors[2 * COLUMNS + column] = lse.low;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = spot.row + row_in_group(half);
            row_factor[half] = 0;
            if (row < at.pairs.rows) prepare(at.row_lse[row], at.row_weight, row_factor[half]);
        }
    }
    __device__ __forceinline__ void finish(const Spot& spot, float (&products)[FRAGMENT]) {
        float share = 0;
        bool fast = named_all(1 + group_of_thread(), WARPGROUP, within_reach);
        if (spot.row < at.pairs.rows) {
            bool special = at.pairs.special(spot);
            if (fast && !special) share = evaluate<true, false>(spot, products);
            else if (fast) share = evaluate<true, true>(spot, products);
            else share = evaluate<false, true>(spot, products);
        }
        write_share(at.shares, spot, share);
    }

    template <bool FAST, bool SPECIAL>
    __device__ __forceinline__ float evaluate(const Spot& spot, float (&products)[FRAGMENT]) {
        const float* factors = exchange[spot.turn][group_of_thread()];
        float factor = scale * LOG2E, share = 0;
        Lse row_lse[2];
        int own[2] = {-1, -1};
        float own_gradient[2] = {0, 0};
        bool inside[2] = {true, true};
        if (SPECIAL) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = spot.row + row_in_group(half);
                inside[half] = row < at.pairs.rows;
                row_lse[half] = split(inside[half] ? at.row_lse[row] : INFINITY);
                own[half] = at.pairs.own_column(spot, half);
                if (own[half] >= 0) {  // p - 1 without the difference
                    double logit = __fmul_rn(scale, pick(products, half, own[half]));
                    float row_part = expm1f(float(logit - at.row_lse[row]));
                    float column_part = expm1f(float(logit - at.column_lse[row + at.pairs.own]));
                    own_gradient[half] = at.row_weight * row_part + at.column_weight * column_part;
                }
            }
        }
        Element* const upper = at.output.place(spot, 0);
        Element* const lower = at.output.place(spot, 1);
#pragma unroll
        for (int part = 0; part < 8; ++part) {
            uint32_t pairs[2][4];
            float part_share = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int j = part * 4 + i;
                float gradient[2][2];
#pragma unroll
                for (int bit = 0; bit < 2; ++bit) {
                    int column = column_in_tile(j, bit);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float product = products[4 * j + 2 * half + bit], value;
                        if (FAST) {
                            value = fast_exp2(fmaf(product, factor, -units)) *
                                    (row_factor[half] + factors[column]);
                        } else {
                            float logit = __fmul_rn(scale, product);
                            Lse lse = {factors[COLUMNS + column], factors[2 * COLUMNS + column]};
                            value = at.row_weight * power_of(logit, row_lse[half]) +
                                    at.column_weight * power_of(logit, lse);
                            value = inside[half] && spot.column + column < at.pairs.columns ? value : 0.0f;
                        }
                        if (SPECIAL && column == own[half]) value = own_gradient[half];
                        part_share = fmaf(value, product, part_share);
                        gradient[half][bit] = value;
                    }
                }
                pairs[0][i] = pack<Element>(gradient[0][0], gradient[0][1]);
                pairs[1][i] = pack<Element>(gradient[1][0], gradient[1][1]);
            }
            at.output.template write<SPECIAL>(spot, 0, part, upper, pairs[0]);
            at.output.template write<SPECIAL>(spot, 1, part, lower, pairs[1]);
            share += part_share;
        }
        return share;
    }
};

// ------------------------------------------------------------------------------------------ the sigmoid loss

// L = scale P + bias; loss = log(1 + exp(-z L)), G = -z / (1 + exp(z L)), z = 1 for an own pair, else -1.
template <class Element>
struct Sigmoid {
    struct Arguments {
        Pairs pairs;
        const float *scale, *bias;
        Output<Element> output;              // matrix == nullptr: the loss alone is wanted
        float *losses, *slopes, *gradients;  // shares of the sums of loss, G P and G
    };
    static __device__ __forceinline__ bool wanted(const Arguments&) { return true; }

    const Arguments& at;
    float scale, bias;

    __device__ __forceinline__ Sigmoid(const Arguments& arguments, Exchange&) : at(arguments) {
        scale = at.scale[0];
        bias = at.bias[0];
    }
    __device__ __forceinline__ void begin(const Spot&) {}
    __device__ __forceinline__ void finish(const Spot& spot, float (&products)[FRAGMENT]) {
        float shares[3] = {0, 0, 0};
        if (spot.row < at.pairs.rows) {
            if (at.pairs.special(spot)) evaluate<true>(spot, products, shares);
            else evaluate<false>(spot, products, shares);
        }
        write_share(at.losses, spot, shares[0]);
        write_share(at.slopes, spot, shares[1]);
        write_share(at.gradients, spot, shares[2]);
    }

    // log(1 + e), 0 <= e <= 1: the series below 1/16, where the sum would round the small e away.
    static __device__ __forceinline__ float log_1_plus(float e) {
        float series = fmaf(e, -1.0f / 6, 0.2f);
        series = fmaf(e, series, -0.25f);
        series = fmaf(e, series, 1.0f / 3);
        series = fmaf(e, series, -0.5f);
        series = fmaf(e, series, 1.0f) * e;
        return e < 0.0625f ? series : fast_log2(1.0f + e) * 0.693147181f;
    }

    template <bool SPECIAL>
    __device__ __forceinline__ void evaluate(const Spot& spot, float (&products)[FRAGMENT],
                                             float (&shares)[3]) {
        const int own[2] = {SPECIAL ? at.pairs.own_column(spot, 0) : -1,
                            SPECIAL ? at.pairs.own_column(spot, 1) : -1};
        const bool inside[2] = {!SPECIAL || spot.row + row_in_group(0) < at.pairs.rows,
                                !SPECIAL || spot.row + row_in_group(1) < at.pairs.rows};
        Element* const upper = at.output.place(spot, 0);
        Element* const lower = at.output.place(spot, 1);
#pragma unroll
        for (int part = 0; part < 8; ++part) {
            uint32_t pairs[2][4];
            float part_shares[3] = {0, 0, 0};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int j = part * 4 + i;
                float gradient[2][2];
#pragma unroll
                for (int bit = 0; bit < 2; ++bit) {
                    int column = column_in_tile(j, bit);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float product = products[4 * j + 2 * half + bit];
                        bool mine = SPECIAL && column == own[half];
                        float against = fmaf(scale, product, bias);  // -z L
                        against = mine ? -against : against;
                        float e = fast_exp2(-fabsf(against) * LOG2E), share = fast_reciprocal(1.0f + e);
                        float loss = fmaxf(against, 0.0f) + log_1_plus(e);
                        if (against != against) loss = against;  // fmaxf drops a NaN
                        float value = against >= 0 ? share : e * share;
                        value = mine ? -value : value;
                        if (SPECIAL && !(inside[half] && spot.column + column < at.pairs.columns))
                            value = loss = 0;
                        part_shares[0] += loss;
                        part_shares[1] = fmaf(value, product, part_shares[1]);
                        part_shares[2] += value;
                        gradient[half][bit] = value;
                    }
                }
                pairs[0][i] = pack<Element>(gradient[0][0], gradient[0][1]);
                pairs[1][i] = pack<Element>(gradient[1][0], gradient[1][1]);
            }
            if (at.output.matrix != nullptr) {
                at.output.template write<SPECIAL>(spot, 0, part, upper, pairs[0]);
                at.output.template write<SPECIAL>(spot, 1, part, lower, pairs[1]);
            }
#pragma unroll
            for (int kind = 0; kind < 3; ++kind) shares[kind] += part_shares[kind];
        }
    }
};

// ------------------------------------------------------------------------------------------------ reductions

// Partial sums, one after the other, in double; with `maxima` each is about its own maximum.
struct Total {
    double sum = 0, maximum = -INFINITY;
    __device__ __forceinline__ void add(double other, double about) {
        if (about == -INFINITY && other == 0) return;
        if (about > maximum) {
            sum = maximum == -INFINITY ? 0.0 : sum * exp(maximum - about);
            maximum = about;
        }
        sum += about == maximum ? other : other * exp(about - maximum);
    }
};

struct Reduction {
    Pairs pairs;  // of this chunk
    const float* scale;
    int64_t first_row;    // of this chunk
    int64_t rows_so_far;  // with this chunk
    bool last;
    float* own_products;  // [all rows]
    const float *row_sums, *row_maxima, *column_sums, *column_maxima;
    double *column_total, *column_maximum;  // [columns], from chunk to chunk
    double *row_lse, *column_lse;
    int* needed;  // set: the sums about the one shift do not serve

    // The own pair's exponential joins the others' sum.
    template <bool ABOUT_MAXIMUM>
    __device__ __forceinline__ double lse(Total total, bool has_own, int64_t own_row) const {
        double shift = double(shift_units(scale[0])) * 0.6931471805599453;
        double logit = has_own ? double(scale[0] * own_products[own_row]) : -INFINITY;
        if (ABOUT_MAXIMUM) {
            if (has_own) total.add(logit != logit ? logit : 1.0, logit);
            return total.maximum + log(total.sum);
        }
        double sum = total.sum + (has_own ? exp(logit - shift) : 0.0);
        if (!(sum > 0x1p-60 && sum < 1e300)) *needed = 1;  // too near to what a float cannot hold, or NaN
        return shift + log(sum);
    }
};

template <bool ABOUT_MAXIMUM>
__global__ void reduce_rows(Reduction at) {
    int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if ((ABOUT_MAXIMUM && *at.needed == 0) || row >= at.pairs.rows) return;
    Total total;
    int tiles = (at.pairs.columns + COLUMNS - 1) / COLUMNS;
#pragma unroll 4
    for (int tile = 0; tile < tiles; ++tile) {
        int64_t slot = int64_t(tile) * at.pairs.rows + row;
        if (ABOUT_MAXIMUM) total.add(at.row_sums[slot], at.row_maxima[slot]);
        else total.sum += at.row_sums[slot];
    }
    int64_t column = row + at.pairs.own;
    bool has_own = column >= 0 && column < at.pairs.columns;
    if (!has_own) at.own_products[at.first_row + row] = NAN;
    at.row_lse[at.first_row + row] = at.lse<ABOUT_MAXIMUM>(total, has_own, at.first_row + row);
}

template <bool ABOUT_MAXIMUM>
__global__ void reduce_columns(Reduction at) {
    int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if ((ABOUT_MAXIMUM && *at.needed == 0) || column >= at.pairs.columns) return;
    Total total;
    if (at.first_row > 0) {
        total.sum = at.column_total[column];
        if (ABOUT_MAXIMUM) total.maximum = at.column_maximum[column];
    }
    int groups = (at.pairs.rows + GROUP_ROWS - 1) / GROUP_ROWS;
#pragma unroll 4
    for (int group = 0; group < groups; ++group) {
        int64_t slot = int64_t(group) * at.pairs.columns + column;
        if (ABOUT_MAXIMUM) total.add(at.column_sums[slot], at.column_maxima[slot]);
        else total.sum += at.column_sums[slot];
    }
    if (!at.last) {
        at.column_total[column] = total.sum;
        if (ABOUT_MAXIMUM) at.column_maximum[column] = total.maximum;
        return;
    }
    int64_t row = column - (at.pairs.own - at.first_row);  // own counts from the chunk's first row
    at.column_lse[column] = at.lse<ABOUT_MAXIMUM>(total, row >= 0 && row < at.rows_so_far, row);
}

// sums[kind] += all of shares[kind, count]; a block for each kind.
constexpr int SUM_THREADS = 1024;  // nothing else runs meanwhile: 16 numbers a thread of a tile of 8192 x 8192
__global__ void __launch_bounds__(SUM_THREADS) add_shares(const float* shares, int64_t count, double* sums) {
    __shared__ double parts[SUM_THREADS];
    shares += blockIdx.x * count;
    double sum = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < count; i += SUM_THREADS) sum += shares[i];
    parts[threadIdx.x] = sum;
    for (int half = SUM_THREADS / 2; half >= 1; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] += parts[0];
}

}  // namespace dalle2_fast::sm90
