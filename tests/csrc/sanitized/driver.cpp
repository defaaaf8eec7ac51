// Calls every function of csrc/cpu with buffers that end where their contents end, on every instruction set of
// this processor. Built with AddressSanitizer and UndefinedBehaviorSanitizer, it ends at a read or write outside.

#include <cstdio>
#include <initializer_list>
#include <vector>

#include "attention.h"
#include "contrastive.h"
#include "convolution.h"
#include "cpu/simd/processor.h"
#include "diffusion.h"
#include "group_norm_silu.h"

using namespace dalle2_fast;
using namespace dalle2_fast::cpu;

namespace {

// Values of any dtype: 0x3c00 and 0x3c003c00 are positive numbers near 1 or 0.01.
std::vector<uint16_t> values(int64_t count, DType dtype) {
    return std::vector<uint16_t>(count * (dtype == DType::f32 ? 2 : 1), 0x3c00);
}

void norms(DType dtype, bool channels_adjacent, int threads, int64_t channels, int64_t positions,
           int64_t groups) {
    const int64_t samples = 3, size = channels * positions;
    const Images images{samples, channels, positions, groups, channels_adjacent, dtype};
    const auto x = values(samples * size, dtype), weight = values(channels, dtype);
    const auto scale = values(samples * channels, dtype);
    auto y = values(samples * size, dtype), dx = y;
    const Affine affine{{weight.data(), dtype, 0}, {nullptr, dtype, 0}, {scale.data(), dtype, channels},
                        {scale.data(), dtype, channels}, true};
    std::vector<float> mean(samples * groups), rstd(samples * groups), sums(2 * samples * channels);
    group_norm_silu(images, x.data(), size, y.data(), size, affine, 1e-5, mean.data(), rstd.data(), threads);
    group_norm_silu_backward(images, y.data(), size, x.data(), size, mean.data(), rstd.data(), affine, dx.data(),
                             size, sums.data(), threads);
}

void convolutions(bool upsample, int threads, int64_t in, int64_t out, int64_t height, int64_t width) {
    const int64_t samples = 2, inputs = samples * height * width / (upsample ? 4 : 1);
    const std::vector<float> x(inputs * in, 1), weight(out * in * 9, 0.1f), bias(out, 1);
    const std::vector<float> residual(samples * height * width * out, 1);
    std::vector<float> filters(convolution_filter_size(in, out)), y(residual.size());
    fingerprint(weight.data(), int64_t(weight.size()));
    transform_filters(weight.data(), in, out, filters.data(), threads);
    convolution3x3({samples, height, width, in, out, upsample}, x.data(), filters.data(), bias.data(),
                   residual.data(), y.data(), threads);
}

void attentions(DType dtype, int threads, int64_t queries, int64_t context, int64_t image, int64_t width) {
    const int64_t samples = 2, heads = 3;
    const auto heads_of = [&](const std::vector<uint16_t>& data, int64_t rows) {
        return Heads{data.data(), heads * rows * width, rows * width, width};
    };
    const auto q = values(samples * heads * queries * width, dtype);
    const auto k = values(samples * heads * context * width, dtype);
    const auto own = values(samples * heads * image * width, dtype);
    auto out = q;
    std::vector<char> mask(samples * context, 1);
    for (int64_t i = 0; i < context; i += 2) mask[i] = 0;
    const Keys keys{heads_of(k, context), heads_of(k, context), context,
                    reinterpret_cast<const bool*>(mask.data()), context};
    const Keys own_keys{heads_of(own, image), heads_of(own, image), image, nullptr, 0};
    attention({samples, heads, queries, width, dtype, 0.2f}, heads_of(q, queries), keys, own_keys, out.data(),
              threads);
}

void steps(DType dtype, bool channels_adjacent, int threads, int64_t channels, int64_t positions) {
    const int64_t samples = 2, size = channels * positions;
    const Shape shape{samples, channels, positions};
    const auto strided = [&](std::vector<uint16_t>& data) {
        return channels_adjacent ? Strided{data.data(), dtype, size, 1, channels}
                                 : Strided{data.data(), dtype, size, positions, 1};
    };
    auto x = values(samples * size, dtype), output = x, other = x, logit = x, previous = x, next = x, x0 = x;
    const std::vector<int64_t> keys{3, -7};
    const std::vector<float> row{0.8f, 0.6f, 0.5f, 0.5f, 0.1f, 0.1f, -4, -1}, scales{1, 2};
    const Seeds seeds{keys.data(), 5};
    sample_noise(shape, strided(next), seeds, threads);
    add_noise(shape, strided(x), scales.data(), scales.data(), strided(next), seeds, strided(x0), threads);
    const StepTensors tensors{strided(x),        strided(output), strided(other), strided(logit),
                              strided(previous), strided(next),   strided(x0)};
    const StepOptions options{row.data(), Prediction::epsilon, scales.data(), 1, 0, 0.5, 1, 0.9};
    diffusion_step(shape, tensors, seeds, options, threads);
}

void losses(int threads, int64_t rows, int64_t columns) {
    const int64_t stride = (columns + 7) / 8 * 8;
    alignas(64) static float products[64 * 1032];
    std::vector<double> row_lse(rows, -1e30), column_lse(columns, -1e30);
    double sums[3];
    const Tile tile{products, stride, rows, columns, -1};
    lse_epilogue(tile, DType::f32, 10, row_lse.data(), column_lse.data(), threads);
    gradient_epilogue(tile, DType::f32, 10, row_lse.data(), column_lse.data(), 1, 1, threads);
    sigmoid_epilogue(tile, DType::f32, 10, -1, true, sums, threads);
    soft_epilogue(tile, products, DType::f32, 10, row_lse.data(), column_lse.data(), row_lse.data(),
                  column_lse.data(), false, sums, threads);
}

}  // namespace

int main() {
    for (int set = 0; set < 4; ++set) {
        if (!choose_instruction_set(static_cast<InstructionSet>(set))) continue;
        for (const int threads : {1, 3}) {
            for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
                for (const bool channels_adjacent : {false, true}) {
                    norms(dtype, channels_adjacent, threads, 6, 5, 2);
                    norms(dtype, channels_adjacent, threads, 34, 77, 2);
                    norms(dtype, channels_adjacent, threads, 520, 9, 1);
                    steps(dtype, channels_adjacent, threads, 3, 7);
                    steps(dtype, channels_adjacent, threads, 1, 1);
                    steps(dtype, channels_adjacent, threads, 3, 4099);
                }
                norms(dtype, true, threads, 20, 9000, 4);
                attentions(dtype, threads, 1, 1, 0, 3);
                attentions(dtype, threads, 37, 5, 70, 48);
                attentions(dtype, threads, 9, 3, 33, 80);
            }
            for (const bool upsample : {false, true}) {
                convolutions(upsample, threads, 3, 5, 2, 2);
                convolutions(upsample, threads, 17, 65, 10, 6);
                convolutions(upsample, threads, 33, 49, 18, 14);
            }
            convolutions(false, threads, 1, 1, 1, 3);
            losses(threads, 3, 5);
            losses(threads, 64, 1030);
        }
        std::printf("instruction set %d\n", set);
    }
}
