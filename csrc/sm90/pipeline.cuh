// The pipeline of a product kernel: TMA fills its stages, wgmma empties them.
//
// A cluster of two blocks computes 256 x 256 products, each block 128 x 256. In a block one warpgroup is the
// producer (a single thread of it issues the copies) and two are consumers, of 64 rows each. Both blocks need
// the same 256 rows of text, so each loads half of them and multicasts it to both. The kernel is persistent:
// a block processes tile after tile, and the producer runs ahead into the next tile while the accumulators of
// this one go through the epilogue. The consumers wait for each other only at the start, where the second is
// delayed by as many stages as the pipeline allows: one multiplies while the other is in its epilogue.
#pragma once

#include <sm90/hardware.h>

#include <cstdint>

namespace dalle2_fast::sm90 {

constexpr int CONSUMERS = 2, CONSUMER_ROWS = 64;      // warpgroups, and the rows of each
constexpr int TILE_ROWS = CONSUMERS * CONSUMER_ROWS;  // of a block
constexpr int TILE_COLUMNS = 256;                     // of a block, and of its cluster
constexpr int CLUSTER_BLOCKS = 2;                     // one below the other
constexpr int STAGE_WIDTH = 64;                       // features per stage: the swizzle's 128 bytes
constexpr int MMA_WIDTH = 16;                         // features per wgmma
constexpr int STAGES = 4;                             // of 48 KB
constexpr int WARPGROUP = 128;                        // threads
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int ROW_BYTES = STAGE_WIDTH * 2;
constexpr int BAND = 8;  // clusters' tiles below each other before the next column, for L2
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;  // 128 * (24 + 2 * 240) <= 65536

// What the warps of a consumer exchange in an epilogue. Tiles alternate between two buffers, so that one
// barrier per tile is enough.
using EpilogueBuffers = float[2][CONSUMERS][2 * 4 * TILE_COLUMNS];

struct SharedStorage {
    unsigned char image[STAGES][TILE_ROWS * ROW_BYTES];
    unsigned char text[STAGES][TILE_COLUMNS * ROW_BYTES];
    EpilogueBuffers epilogue;
    uint64_t full[STAGES], empty[STAGES];  // mbarriers
};

struct TileGrid {
    int rows, columns;
    int stages_per_tile;          // the width in units of STAGE_WIDTH
    int row_tiles, column_tiles;  // of a cluster
};

struct TileIndex {
    int row_tile, column_tile;
};

// The order of the tiles: down a band of BAND rows of tiles, then the next column. The image rows of a band
// (2 MB at width 512) stay in L2, and the text is read from memory once per band.
__device__ __forceinline__ TileIndex raster(int64_t tile, const TileGrid& grid) {
    int64_t tiles_per_band = int64_t(BAND) * grid.column_tiles;
    int band = int(tile / tiles_per_band), first = band * BAND;
    int height = grid.row_tiles - first < BAND ? grid.row_tiles - first : BAND;
    int within = int(tile - band * tiles_per_band);
    return {first + within % height, within / height};
}

struct PipelineStage {
    int index = 0;
    uint32_t parity = 0;  // of the stage's current phase
    __device__ __forceinline__ void advance() {
        if (++index == STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ int consumer_index() { return int(threadIdx.x) / WARPGROUP - 1; }
__device__ __forceinline__ int thread_in_warpgroup() { return int(threadIdx.x) % WARPGROUP; }
__device__ __forceinline__ int lane_in_warp() { return int(threadIdx.x) % 32; }

// -------------------------------------------------------------------------------------------------- producer

__device__ __forceinline__ void produce_tiles(SharedStorage& shared, const TensorMap& image,
                                              const TensorMap& text, const TileGrid& grid) {
    int rank = int(cluster_rank());
    int64_t tiles = int64_t(grid.row_tiles) * grid.column_tiles;
    PipelineStage stage;
    for (int64_t tile = blockIdx.x / CLUSTER_BLOCKS; tile < tiles; tile += gridDim.x / CLUSTER_BLOCKS) {
        TileIndex index = raster(tile, grid);
        int row = (index.row_tile * CLUSTER_BLOCKS + rank) * TILE_ROWS;
        int text_part = rank * (TILE_COLUMNS / CLUSTER_BLOCKS);  // this block's half of the text
        int column = index.column_tile * TILE_COLUMNS + text_part;
#pragma unroll 1
        for (int step = 0; step < grid.stages_per_tile; ++step) {
            // The consumers of both blocks must have released the stage, because the text goes to both.
            mbarrier_wait(&shared.empty[stage.index], stage.parity ^ 1);
            mbarrier_arrive_expect_bytes(&shared.full[stage.index], (TILE_ROWS + TILE_COLUMNS) * ROW_BYTES);
            tma_load(image, shared.image[stage.index], &shared.full[stage.index], step * STAGE_WIDTH, row);
            tma_load_multicast(text, &shared.text[stage.index][text_part * ROW_BYTES],
                               &shared.full[stage.index], step * STAGE_WIDTH, column,
                               (1 << CLUSTER_BLOCKS) - 1);
            stage.advance();
        }
    }
}

// ------------------------------------------------------------------------------------------------- consumers

// A warp has read the stage. Both blocks must know, because both write into it.
__device__ __forceinline__ void release_stage(SharedStorage& shared, int index) {
    int lane = lane_in_warp();
    if (lane < CLUSTER_BLOCKS) mbarrier_arrive_remote(&shared.empty[index], lane);
}

// The main loop: accumulator = the consumer's 64 x 256 products over the whole width.
template <class Element>
__device__ __forceinline__ void accumulate_tile(SharedStorage& shared, PipelineStage& stage,
                                                int stages_per_tile, bool first_tile,
                                                float (&accumulator)[FRAGMENT]) {
    constexpr int STAGGER_BARRIER = CONSUMERS + 1;  // barriers 1 and 2 belong to one consumer each
    int consumer = consumer_index();
    int previous = 0;
    if (first_tile && consumer == 1) named_barrier_sync(STAGGER_BARRIER, CONSUMERS * WARPGROUP);
#pragma unroll 1
    for (int step = 0; step < stages_per_tile; ++step) {
        mbarrier_wait(&shared.full[stage.index], stage.parity);
        uint64_t rows = matrix_descriptor(&shared.image[stage.index][consumer * CONSUMER_ROWS * ROW_BYTES]);
        uint64_t columns = matrix_descriptor(shared.text[stage.index]);
        warpgroup_fence_operand(accumulator);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < STAGE_WIDTH / MMA_WIDTH; ++part) {
            uint64_t offset = part * MMA_WIDTH * 2 / 16;  // a descriptor counts 16 bytes
            wgmma<Element>(accumulator, rows + offset, columns + offset, step + part > 0);
        }
        wgmma_commit_group();
        warpgroup_fence_operand(accumulator);
        // One group is always queued behind the one that runs.
        wgmma_wait_group<1>();
        if (step > 0) release_stage(shared, previous);
        // The other consumer starts once this one has finished all but one of the pipeline's stages.
        if (first_tile && consumer == 0 &&
            step == (stages_per_tile < STAGES - 1 ? stages_per_tile : STAGES - 1) - 1)
            named_barrier_arrive(STAGGER_BARRIER, CONSUMERS * WARPGROUP);
        previous = stage.index;
        stage.advance();
    }
    wgmma_wait_group<0>();
    warpgroup_fence_operand(accumulator);
    release_stage(shared, previous);
}

}  // namespace dalle2_fast::sm90
