// The contrastive losses: what Python calls on one tile of the matrix of products.
//
// kernels/contrastive/loss.py loops over tiles of P[i, j] = <image_i, text_j>, which torch's matrix product puts
// into a bounded workspace (float32, or float64 for float64 features). An epilogue reads a tile once and reduces
// it, or turns it into the gradient G = dLoss/dLogits, from which torch's matrix products make dI and dT.
//
//   L = float(scale * P)         the logits, rounded once: the forward and the gradient pass see the same number
//   row_lse[i]    = log sum over j of exp L[i, j]      float64, natural: near 100 a float32 is off by 4e-6,
//   column_lse[j] = log sum over i of exp L[i, j]      and exp(L - lse) - 1 of an easy pair does not survive that
//
// A row's own text is column `own + i` of the tile; outside [0, columns) the row has none in this tile.
//
// One exponential per element where that is safe: sums of exp(L - shift) with shift about |scale| - 70 serve rows
// and columns alike. A row or column whose sum is not well inside float32's range (un-normalised features, low
// cosines at a high scale) is summed again about its own maximum. Rounding L - shift costs 4e-6, so the shift belongs
// into the exponent, as a power of two, or must be exact otherwise. Non-finite logits give a non-finite lse.
//
// Every sum has a fixed order, whatever the number of threads or the schedule of the blocks: equal calls give equal
// bits. Columns of a tile past `columns`, up to `stride`, are neither read into a result nor written.

#pragma once

#include <cstdint>

namespace dalle2_fast {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct Tile {
    void* products;   // [rows, columns] of P; begins at a multiple of 32 bytes
    int64_t stride;   // elements from row to row; a multiple of 8, at least columns
    int64_t rows;     // >= 1
    int64_t columns;  // >= 1
    int64_t own;      // column of row 0's own text; may be negative or past the end
};

// ------------------------------------------------------------------------------------------- contrastive_cpu.cpp
// Products and what replaces them are of type f32 or f64 (`dtype`); `threads` >= 1 may be more than are used.
namespace cpu {

// row_lse[rows], column_lse[columns]: the running values, -infinity before the first tile; this tile is added.
void lse_epilogue(const Tile& tile, DType dtype, double scale, double* row_lse, double* column_lse, int threads);

// P becomes G = row_weight exp(L - row_lse[i]) + column_weight exp(L - column_lse[j]) - (row_weight + column_weight)
// [j is i's own]. Returns the sum of G P, which is this tile's share of dLoss/dScale.
double gradient_epilogue(const Tile& tile, DType dtype, double scale, const double* row_lse,
                         const double* column_lse, double row_weight, double column_weight, int threads);

// L = scale P + bias, z = 1 for an own pair, else -1. sums[0..2] = sum of log(1 + exp(-z L)), of G P and of G,
// where G = -z / (1 + exp(z L)); with `gradient` P becomes G, else sums[1..2] are 0 and P stays.
void sigmoid_epilogue(const Tile& tile, DType dtype, double scale, double bias, bool gradient, double* sums,
                      int threads);

// Soft targets: A = float(scale / 2 * alike), alike[rows, columns] = the tile of I I^T + T T^T (same stride as the
// tile), alike_row_lse[rows] and alike_column_lse[columns] its lse (A is symmetric: parts of one vector).
//   p = exp(A - alike_row_lse[i]), q = exp(A - alike_column_lse[j])
// sums[0] = sum of p (row_lse[i] - L) + q (column_lse[j] - L), sums[1] = sum of G P, where
// G = exp(L - row_lse[i]) + exp(L - column_lse[j]) - p - q; with `gradient` P becomes G, else sums[1] is 0.
void soft_epilogue(const Tile& tile, const void* alike, DType dtype, double scale, const double* row_lse,
                   const double* column_lse, const double* alike_row_lse, const double* alike_column_lse,
                   bool gradient, double* sums, int threads);

}  // namespace cpu

// ----------------------------------------------------------------------------------------- contrastive_cuda.cu: M1
// The same on the device, for float32 products: every pointer is device memory, `stream` is a cudaStream_t, nothing
// waits for the device or allocates (CUDA-graph capture). L = float(float(factor * scale[0]) * P). A failed launch
// throws std::runtime_error with CUDA's message.
//
// G goes to `gradient` [rows, columns], rows `gradient_stride` apart (a multiple of 8), of type `gradient_dtype`
// (f32, f16 or bf16, rounded once); it may be the tile itself (f32, same stride). `sums` are ADDED to: the caller
// zeroes them before the first tile. `workspace`: at least workspace_bytes(rows, columns), begins at a multiple of
// 256 bytes, needs no initial value.
//
// The re-summing about the maximum is launched always and leaves at once where a flag on the device says that this
// tile's sums are in range.
namespace cuda {

int64_t workspace_bytes(int64_t rows, int64_t columns);  // for any of the four

void lse_epilogue(const Tile& tile, float factor, const float* scale, double* row_lse, double* column_lse,
                  void* workspace, void* stream);

// own[rows] = <image_i, text_i> of features of f16 or bf16, whose rows are `stride` and whose columns `step` elements
// apart; every addition rounded to the nearest float32.
void own_products(const void* image, int64_t image_stride, int64_t image_step, const void* text, int64_t text_stride,
                  int64_t text_step, int64_t rows, int64_t width, DType dtype, float* own, void* stream);

void gradient_epilogue(const Tile& tile, const float* scale, const double* row_lse, const double* column_lse,
                       float row_weight, float column_weight, void* gradient, int64_t gradient_stride,
                       DType gradient_dtype, double* sums /* [1] */, void* workspace, void* stream);

// gradient == nullptr: only sums[0] is wanted (and added to).
void sigmoid_epilogue(const Tile& tile, const float* scale, const float* bias, void* gradient,
                      int64_t gradient_stride, DType gradient_dtype, double* sums /* [3] */, void* workspace,
                      void* stream);

void soft_epilogue(const Tile& tile, const float* alike, const float* scale, const double* row_lse,
                   const double* column_lse, const double* alike_row_lse, const double* alike_column_lse,
                   void* gradient, int64_t gradient_stride, DType gradient_dtype, double* sums /* [2] */,
                   void* workspace, void* stream);

}  // namespace cuda

// ----------------------------------------------------------------------------------------- contrastive_sm90.cu: M2
// Product and epilogue in one kernel (TMA, wgmma): no products are stored. Conventions as `cuda`; here a "tile" is
// given by its features. The lse call takes the whole matrix at once (rows = n, columns = M).
namespace sm90 {

struct Features {
    const void* image;     // [rows, width], begins at a multiple of 16 bytes
    const void* text;      // [columns, width], likewise
    int64_t image_stride;  // elements from row to row; 16-byte multiples
    int64_t text_stride;
    int64_t rows, columns, width;
    int64_t own;           // column of row 0's own text
    DType dtype;           // f16 or bf16
};

// nullptr where these features can run here (the current device is sm_90, built with this file, TMA's conditions
// hold); otherwise why not. Never waits for the device.
const char* obstacle(const Features& features);

int64_t workspace_bytes(int64_t rows, int64_t columns, int64_t width);  // for either call

// Sets (does not add to) row_lse and column_lse; own_products[rows] = P[i, own + i], bit for bit the product that
// the sums used, NaN for a row without own text.
void lse(const Features& features, const float* scale, double* row_lse, double* column_lse, float* own_products,
         void* workspace, void* stream);

// gradient [rows, columns] in features.dtype; otherwise as cuda::gradient_epilogue.
void gradient(const Features& features, const float* scale, const double* row_lse, const double* column_lse,
              float row_weight, float column_weight, void* gradient, int64_t gradient_stride,
              double* sums /* [1] */, void* workspace, void* stream);

// As cuda::sigmoid_epilogue; gradient [rows, columns] in features.dtype, or nullptr.
void sigmoid(const Features& features, const float* scale, const float* bias, void* gradient,
             int64_t gradient_stride, double* sums /* [3] */, void* workspace, void* stream);

}  // namespace sm90

}  // namespace dalle2_fast
