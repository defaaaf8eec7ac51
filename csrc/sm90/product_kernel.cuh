// The persistent kernel: products of image and text features, and an epilogue on the accumulators in
// registers.
#pragma once

#include <cstdint>

#include "sm90/fragment.cuh"
#include "sm90/pipeline.cuh"

namespace dalle2_fast::sm90 {

// An Epilogue is constructed once per thread. It has
//   Arguments              the kernel's parameters, among them where its results go
//   is_needed(arguments)   whether the kernel has anything to do
//   begin(tile)            runs before the main loop of a tile
//   finish(tile, products) consumes the accumulator
template <class Element, class Epilogue>
__global__ void __launch_bounds__(THREADS, 1)
    product_kernel(const __grid_constant__ TensorMap image, const __grid_constant__ TensorMap text,
                   const __grid_constant__ TileGrid grid,
                   const __grid_constant__ typename Epilogue::Arguments arguments) {
    if (!Epilogue::is_needed(arguments)) return;
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic_shared());
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(&shared.full[stage], 1);
            mbarrier_init(&shared.empty[stage], CLUSTER_BLOCKS * CONSUMERS * (WARPGROUP / 32));
        }
        mbarrier_init_fence();
    }
    cluster_sync();
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_decrease<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce_tiles(shared, image, text, grid);
    } else {
        setmaxnreg_increase<CONSUMER_REGISTERS>();
        int consumer = consumer_index(), rank = int(cluster_rank());
        int64_t tiles = int64_t(grid.row_tiles) * grid.column_tiles, first = blockIdx.x / CLUSTER_BLOCKS;
        Epilogue epilogue(arguments, shared.epilogue);
        PipelineStage stage;
        int buffer = 0;
        for (int64_t tile = first; tile < tiles; tile += gridDim.x / CLUSTER_BLOCKS, buffer ^= 1) {
            TileIndex index = raster(tile, grid);
            ConsumerTile part;
            part.row = ((index.row_tile * CLUSTER_BLOCKS + rank) * CONSUMERS + consumer) * CONSUMER_ROWS;
            part.column = index.column_tile * TILE_COLUMNS;
            part.column_tile = index.column_tile;
            part.buffer = buffer;
            part.slot = (tile * CLUSTER_BLOCKS + rank) * CONSUMERS + consumer;
            float products[FRAGMENT];
            epilogue.begin(part);
            accumulate_tile<Element>(shared, stage, grid.stages_per_tile, tile == first, products);
            epilogue.finish(part, products);
        }
    }
    cluster_sync();  // the other block may still write into this one, or arrive at its barriers
}

}  // namespace dalle2_fast::sm90
