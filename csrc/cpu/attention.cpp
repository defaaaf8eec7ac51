// The attention of attention.h. A thread takes a head of a sample, or a part of its queries: it packs the keys and
// values that the mask leaves, and goes through the queries in blocks whose scores stay in its L2 cache.

#include "attention.h"

#include <cmath>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "cpu/simd/panels.h"
#include "cpu/parallel.h"
#include "cpu/simd/processor.h"
#include "cpu/simd/storage.h"

namespace dalle2_fast::cpu {
namespace {

constexpr int64_t QUERIES = 32;              // of a block, a multiple of 8
constexpr int64_t SCORES = int64_t(1) << 17;  // the most scores of a block, 0.5 MB; at least 8 queries all the same

#define BODY "cpu/attention_loops.h"
#include "cpu/simd/instruction_sets.h"

template <class S>
void run(const Attention& shape, const Heads& q, const Keys& context, const Keys& image, S* out, int threads) {
    const int64_t columns = padded(context.count + image.count), width = padded(shape.width);
    const int64_t block = std::max<int64_t>(std::min(QUERIES, SCORES / std::max<int64_t>(columns, 1) / 8 * 8), 8);
    const int64_t heads = shape.samples * shape.heads;
    const int64_t blocks = (shape.queries + block - 1) / block;
    const int64_t parts = std::min<int64_t>(heads % threads == 0 ? 1 : threads, blocks);  // of the queries of a head
    const int64_t operations = heads * shape.queries * columns * 8;
    parallel_for(heads * parts, operations, threads, [&](int64_t item) {
        const int64_t sample = item / parts / shape.heads, head = item / parts % shape.heads, part = item % parts;
        static thread_local Floats memory;
        float* k = memory.at_least(columns * (shape.width + width + block) + block * 2 * width + width);
        float *v = k + columns * shape.width, *scores = v + columns * width;
        float *queries = scores + block * columns, *results = queries + block * width, *row = results + block * width;
        // Products with the columns behind the last key are replaced by 0, but must be numbers.
        std::fill(k, k + columns * shape.width, 0.0f);
        int64_t keys = DISPATCH(pack_keys<S>, context, sample, head, shape.width, 0, columns, k, v, row);
        keys = DISPATCH(pack_keys<S>, image, sample, head, shape.width, keys, columns, k, v, row);
        const S* from = q.at<S>(sample, head);
        S* to = out + (sample * shape.queries * shape.heads + head) * shape.width;
        for (int64_t index = part * blocks / parts; index < (part + 1) * blocks / parts; ++index) {
            const int64_t first = index * block, count = std::min(block, shape.queries - first);
            S* rows = to + first * shape.heads * shape.width;
            if (keys == 0) {
                for (int64_t i = 0; i < count; ++i)
                    std::fill(rows + i * shape.heads * shape.width, rows + i * shape.heads * shape.width + shape.width,
                              S());
            } else {
                DISPATCH(attend<S>, shape, from + first * q.row_stride, q.row_stride, count, k, v, keys, columns,
                         queries, scores, results, rows);
            }
        }
    });
}

}  // namespace

void attention(const Attention& shape, const Heads& q, const Keys& context, const Keys& image, void* out,
               int threads) {
    with_type(shape.dtype, out, [&](auto* typed) {
        using Stored = std::remove_pointer_t<decltype(typed)>;
        if constexpr (!std::is_same_v<Stored, double>) run<Stored>(shape, q, context, image, typed, threads);
    });
}

}  // namespace dalle2_fast::cpu
