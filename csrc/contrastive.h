// The contrastive losses: the functions that Python calls, on the CPU, on any GPU and on Hopper.
//
// kernels/contrastive/ loops over tiles of the products P[i, j] = <image_i, text_j>. torch's matrix product
// writes a tile into a bounded workspace (float32; float64 for float64 features). An epilogue reads the tile
// once: it reduces the tile to log-sum-exps, or replaces it by the gradient G = dLoss/dLogits, from which
// torch's matrix products make the gradients of the features.
//
//   L = float(scale * P)                      the logits, rounded once: both passes see the same numbers
//   row_lse[i]    = log sum over j of exp L[i, j]
//   column_lse[j] = log sum over i of exp L[i, j]
//
// The lse are float64 and natural logarithms: near 100 a float32 is off by 4e-6, and exp(L - lse) - 1 of an
// easy pair is smaller than that.
//
// The positive pair of row i is column `diagonal_offset + i` of the tile. A row for which this is outside
// [0, columns) has its positive in another tile.
//
// One exponential per element where that is safe: sums of exp(L - shift), with shift about |scale| - 70,
// serve rows and columns alike. A row or column whose sum is not well inside float32's range (un-normalised
// features, or low cosines at a high scale) is summed again about its own maximum. Rounding L - shift would
// cost 4e-6, so the shift is either applied to the exponent, as a power of two, or exact. Non-finite logits
// give a non-finite lse.
//
// Every sum has a fixed order, which depends neither on the number of threads nor on the schedule of the
// blocks: equal calls give equal bits. Columns of a tile from `columns` up to `stride` are padding: they do
// not change a result and are not written.

#pragma once

#include <cstdint>

namespace dalle2_fast {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct Tile {
    void* products;           // [rows, columns] of P; aligned to 32 bytes
    int64_t stride;           // elements from row to row; a multiple of 8, at least columns
    int64_t rows;             // >= 1
    int64_t columns;          // >= 1
    int64_t diagonal_offset;  // column of row 0's positive; may be negative or past the end
};

// --------------------------------------------------------------------------------------- cpu/contrastive.cpp
// Products, and the gradient that replaces them, are of type f32 or f64 (`dtype`). `threads` >= 1 is an upper
// limit.
namespace cpu {

// row_lse[rows] and column_lse[columns] are running values, -infinity before the first tile; this tile's
// exponentials are added.
void lse_epilogue(const Tile& tile, DType dtype, double scale, double* row_lse, double* column_lse,
                  int threads);

// P becomes G = row_weight exp(L - row_lse[i]) + column_weight exp(L - column_lse[j]), less
// row_weight + column_weight for the positive pair. Returns the sum of G P, this tile's part of dLoss/dScale.
double gradient_epilogue(const Tile& tile, DType dtype, double scale, const double* row_lse,
                         const double* column_lse, double row_weight, double column_weight, int threads);

// L = scale P + bias; z = 1 for a positive pair, else -1. sums[0..2] = the sums of log(1 + exp(-z L)), of G P
// and of G, where G = -z / (1 + exp(z L)). With `gradient` P becomes G; without, sums[1..2] are 0 and P
// stays.
void sigmoid_epilogue(const Tile& tile, DType dtype, double scale, double bias, bool gradient, double* sums,
                      int threads);

// Soft targets. similarity[rows, columns] is the tile of S = I I^T + T T^T (same stride as the tile), A =
// float(scale / 2 * S) are the targets' logits, similarity_row_lse[rows] and similarity_column_lse[columns]
// are A's lse (A is symmetric, so they are parts of one vector).
//   p = exp(A - similarity_row_lse[i]), q = exp(A - similarity_column_lse[j])
// sums[0] = sum of p (row_lse[i] - L) + q (column_lse[j] - L) and sums[1] = sum of G P, where G = exp(L -
// row_lse[i]) + exp(L - column_lse[j]) - p - q. With `gradient` P becomes G; without, sums[1] is 0.
void soft_epilogue(const Tile& tile, const void* similarity, DType dtype, double scale, const double* row_lse,
                   const double* column_lse, const double* similarity_row_lse,
                   const double* similarity_column_lse, bool gradient, double* sums, int threads);

}  // namespace cpu

// --------------------------------------------------------------------------------------- cuda/contrastive.cu
// The same on a GPU, for float32 products. Every pointer is device memory, `stream` is a cudaStream_t.
// Nothing waits for the device or allocates, so the calls can be captured in a CUDA graph. L =
// float(float(factor * scale[0]) * P). A failed launch throws std::runtime_error with CUDA's message.
//
// G goes to `gradient` [rows, columns], rows `gradient_stride` apart (a multiple of 8), of type
// `gradient_dtype` (f32, f16 or bf16, rounded once). It may be the tile itself (f32, same stride). `sums` are
// ADDED to: the caller zeroes them before the first tile. `workspace` has at least
// workspace_bytes(rows, columns), is aligned to 256 bytes and needs no initial value.
//
// The kernels that sum again about the maximum are always launched. They return at once where a flag on the
// device says that all sums of this tile are in range.
namespace cuda {

int64_t workspace_bytes(int64_t rows, int64_t columns);  // enough for each of the four epilogues

void lse_epilogue(const Tile& tile, float factor, const float* scale, double* row_lse, double* column_lse,
                  void* workspace, void* stream);

// positives[rows] = <image_i, text_i> of f16 or bf16 features with any strides (`row_stride` elements from
// row to row, `column_stride` along a row). Every addition is rounded to the nearest float32.
void positive_products(const void* image, int64_t image_row_stride, int64_t image_column_stride,
                       const void* text, int64_t text_row_stride, int64_t text_column_stride, int64_t rows,
                       int64_t width, DType dtype, float* positives, void* stream);

void gradient_epilogue(const Tile& tile, const float* scale, const double* row_lse, const double* column_lse,
                       float row_weight, float column_weight, void* gradient, int64_t gradient_stride,
                       DType gradient_dtype, double* sums /* [1] */, void* workspace, void* stream);

// gradient == nullptr: only sums[0] is computed and added.
void sigmoid_epilogue(const Tile& tile, const float* scale, const float* bias, void* gradient,
                      int64_t gradient_stride, DType gradient_dtype, double* sums /* [3] */, void* workspace,
                      void* stream);

void soft_epilogue(const Tile& tile, const float* similarity, const float* scale, const double* row_lse,
                   const double* column_lse, const double* similarity_row_lse,
                   const double* similarity_column_lse, void* gradient, int64_t gradient_stride,
                   DType gradient_dtype, double* sums /* [2] */, void* workspace, void* stream);

}  // namespace cuda

// --------------------------------------------------------------------------------------- sm90/contrastive.cu
// Product and epilogue in one kernel (TMA, wgmma): products are not stored. The conventions are those of
// `cuda`, but a tile is given by its features.
namespace sm90 {

struct Features {
    const void* image;     // [rows, width], aligned to 16 bytes
    const void* text;      // [columns, width], aligned to 16 bytes
    int64_t image_stride;  // elements from row to row; a multiple of 16 bytes
    int64_t text_stride;   // the same for text
    int64_t rows, columns, width;
    int64_t diagonal_offset;  // column of row 0's positive
    DType dtype;              // f16 or bf16
};

// nullptr if these features can run here: the current device is one that this file was compiled for, and
// TMA's conditions hold. Otherwise the reason why not. Never waits for the device.
const char* why_unavailable(const Features& features);

int64_t workspace_bytes(int64_t rows, int64_t columns, int64_t width);  // enough for each of the three calls

// Sets (does not add to) row_lse and column_lse of the whole matrix. positive_products[rows] = P of the
// positive pairs, bit for bit the products that the sums used; NaN for a row without a positive.
void lse(const Features& features, const float* scale, double* row_lse, double* column_lse,
         float* positive_products, void* workspace, void* stream);

// gradient [rows, columns] is of features.dtype; otherwise as cuda::gradient_epilogue.
void gradient(const Features& features, const float* scale, const double* row_lse, const double* column_lse,
              float row_weight, float column_weight, void* gradient, int64_t gradient_stride,
              double* sums /* [1] */, void* workspace, void* stream);

// As cuda::sigmoid_epilogue; gradient [rows, columns] is of features.dtype, or nullptr.
void sigmoid(const Features& features, const float* scale, const float* bias, void* gradient,
             int64_t gradient_stride, double* sums /* [3] */, void* workspace, void* stream);

}  // namespace sm90

}  // namespace dalle2_fast
