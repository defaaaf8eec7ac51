// Group norm, FiLM and SiLU on the CPU, see group_norm_silu.h.
//
// An *item* is what is normalised together and lies together: a sample in channels_last, a group of a sample
// (a slab) otherwise. It is cut into chunks. A thread takes a whole item, so that the second pass over it
// reads from its L2 cache; where there are too few items for the threads, they share the chunks of each pass.

#include "group_norm_silu.h"

#include <cmath>
#include <memory>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "cpu/simd/processor.h"
#include "cpu/simd/storage.h"

namespace dalle2_fast::cpu {
namespace {

#define BODY "cpu/group_norm_silu_loops.h"
#include "cpu/simd/instruction_sets.h"

constexpr int64_t CHUNK_BYTES = 1 << 18;  // of x; L2 caches have 256 KB to 2 MB
constexpr int64_t PADDING = 16;           // values of the longest vector
constexpr int64_t FIRST_VALUES = 256;     // whose mean is subtracted before squares are summed

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// How the images are cut into items and chunks, by their shape only.
struct Cut {
    Images images;
    int64_t items, chunks;
    int64_t group_width;     // channels of a group
    int64_t item_channels;   // channels of an item, and their groups
    int64_t item_groups;
    int64_t padded;          // item_channels with padding
    int64_t rows_per_chunk;  // channels_last: positions of a chunk
    int64_t run;             // contiguous: values of a chunk

    explicit Cut(const Images& given) : images(given) {
        const int64_t size = images.dtype == DType::f32 ? 4 : 2;
        group_width = images.channels / images.groups;
        items = images.samples * (images.channels_adjacent ? 1 : images.groups);
        item_channels = images.channels_adjacent ? images.channels : group_width;
        item_groups = images.channels_adjacent ? images.groups : 1;
        padded = divide_up(item_channels, PADDING) * PADDING;
        rows_per_chunk = std::max<int64_t>(CHUNK_BYTES / (item_channels * size) / 64 * 64, 64);
        run = CHUNK_BYTES / size;
        chunks = images.channels_adjacent ? divide_up(images.positions, rows_per_chunk)
                                          : divide_up(group_width * images.positions, run);
    }

    int64_t elements() const { return images.samples * images.channels * images.positions; }
    int64_t sample(int64_t item) const { return images.channels_adjacent ? item : item / images.groups; }
    int64_t first_group(int64_t item) const { return images.channels_adjacent ? 0 : item % images.groups; }
    int64_t first_channel(int64_t item) const { return first_group(item) * group_width; }

    template <class S>
    S* at(S* samples, int64_t stride, int64_t item) const {
        return samples + sample(item) * stride + first_channel(item) * images.positions;
    }
};

// Calls first(item), sums(item, chunk) of all chunks, merge(item), and apply(item, chunk, next) of all chunks.
// next: the item that the same thread takes next, or the same item where there is none.
template <class First, class Sums, class Merge, class Apply>
void in_two_passes(const Cut& cut, int threads, First first, Sums sums, Merge merge, Apply apply) {
    const int64_t elements = cut.elements();
    const bool balanced = cut.items % threads == 0 || cut.items >= 4 * threads;
    if (threads == 1 || cut.chunks == 1 || balanced) {
        const int64_t parts = std::min<int64_t>(cut.items, threads);
        parallel_for(parts, elements, threads, [&](int64_t part) {
            const int64_t end = (part + 1) * cut.items / parts;
            for (int64_t item = part * cut.items / parts; item < end; ++item) {
                const int64_t next = std::min(item + 1, end - 1);
                first(item);
                for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) sums(item, chunk);
                merge(item);
                for (int64_t chunk = cut.chunks; chunk-- > 0;) apply(item, chunk, next);  // the last is in L2
            }
        });
        return;
    }
    const auto over_chunks = [&](auto work) {
        parallel_for(cut.items * cut.chunks, elements, threads,
                     [&](int64_t index) { work(index / cut.chunks, index % cut.chunks); });
    };
    for (int64_t item = 0; item < cut.items; ++item) first(item);
    over_chunks(sums);
    for (int64_t item = 0; item < cut.items; ++item) merge(item);
    over_chunks([&](int64_t item, int64_t chunk) { apply(item, chunk, item); });
}

// COUNT arrays of a value per channel of an item, for every item. They are not initialised.
template <class T, int COUNT>
class PerChannel {
public:
    PerChannel(const Cut& cut, int64_t parts = 1)
        : stride_(cut.padded), parts_(parts), memory_(new char[sizeof(T) * size(cut, parts) + ALIGNMENT]) {
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        values_ = reinterpret_cast<T*>(divide_up(address, ALIGNMENT) * ALIGNMENT);
    }
    T* operator()(int64_t item, int index, int64_t part = 0) const {
        return values_ + ((item * parts_ + part) * COUNT + index) * stride_;
    }

private:
    static constexpr int64_t ALIGNMENT = 64;  // a vector that crosses two cache lines loads half as fast
    static int64_t size(const Cut& cut, int64_t parts) { return cut.items * parts * COUNT * cut.padded; }

    int64_t stride_, parts_;
    std::unique_ptr<char[]> memory_;
    T* values_;
};

template <class S>
void copy_floats(const S* from, int64_t count, float* to) {
    portable::to_floats(from, count, to);
}
void copy_floats(const double* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]);
}

// g = weight (1 + scale) and o = bias (1 + scale) + shift of an item's channels.
struct GainAndOffset {
    std::unique_ptr<float[]> values;
    float *weight, *bias, *scale, *shift;

    GainAndOffset(const Cut& cut, const Affine& affine, int64_t item)
        : values(new float[4 * cut.padded]),
          weight(load(cut, affine.weight, item, 0, 1)),
          bias(load(cut, affine.bias, item, 1, 0)),
          scale(load(cut, affine.scale, item, 2, 0)),
          shift(load(cut, affine.shift, item, 3, 0)) {}

    double gain(int64_t channel) const { return weight[channel] * (1.0 + scale[channel]); }
    double offset(int64_t channel) const { return bias[channel] * (1.0 + scale[channel]) + shift[channel]; }

private:
    float* load(const Cut& cut, const Parameter& parameter, int64_t item, int index, float absent) {
        float* to = values.get() + index * cut.padded;
        if (!parameter.data) {
            std::fill(to, to + cut.item_channels, absent);
        } else {
            const int64_t first = cut.sample(item) * parameter.sample_stride + cut.first_channel(item);
            with_type(parameter.dtype, parameter.data,
                      [&](auto* data) { copy_floats(data + first, cut.item_channels, to); });
        }
        return to;
    }
};

// Calls work(first channel, number of values, offset in the item's memory) for the parts of a chunk that lie in
// one channel (contiguous layout).
template <class Work>
void for_channels_of(const Cut& cut, int64_t chunk, Work work) {
    const int64_t positions = cut.images.positions;
    const int64_t end = std::min((chunk + 1) * cut.run, cut.group_width * positions);
    for (int64_t begin = chunk * cut.run; begin < end;) {
        const int64_t channel = begin / positions, stop = std::min((channel + 1) * positions, end);
        work(channel, stop - begin, begin);
        begin = stop;
    }
}

int64_t rows_of(const Cut& cut, int64_t chunk) {
    return std::min(cut.rows_per_chunk, cut.images.positions - chunk * cut.rows_per_chunk);
}

// --------------------------------------------------------------------------------------------------- forward

template <bool SILU, class S>
void forward(const Cut& cut, const S* x, int64_t x_stride, S* y, int64_t y_stride, const Affine& affine,
             double eps, float* mean, float* rstd, int threads) {
    enum { CENTER, GAIN, OFFSET };
    const PerChannel<float, 3> coefficients(cut);
    const PerChannel<double, 2> sums(cut, cut.chunks);
    const int64_t columns = cut.item_channels, width = cut.group_width;
    const bool in_columns = cut.images.channels_adjacent;

    const auto moments = [&](int64_t item, const S* from, int64_t count, double* to) {  // count: rows or values
        const float* center = coefficients(item, CENTER);
        if (in_columns) {
            std::fill(to, to + 2 * cut.padded, 0.0);
            DISPATCH(block_moments, from, count, columns, center, to, cut.padded);
        } else {
            to[0] = to[cut.padded] = 0;
            double pair[2] = {0, 0};
            DISPATCH(run_moments, from, count, center[0], pair);
            to[0] = pair[0];
            to[cut.padded] = pair[1];
        }
    };
    const auto group_sum = [&](const double* values, int64_t group) {
        if (!in_columns) return values[0];
        double total = 0;
        for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) total += values[channel];
        return total;
    };
    const auto find_centers = [&](int64_t item) {
        float* center = coefficients(item, CENTER);
        std::fill(center, center + cut.padded, 0.0f);
        const int64_t first = std::min(divide_up(FIRST_VALUES, in_columns ? width : 1),
                                       in_columns ? cut.images.positions : width * cut.images.positions);
        moments(item, cut.at(x, x_stride, item), first, sums(item, 0));
        for (int64_t group = 0; group < cut.item_groups; ++group) {
            const double count = double(first) * (in_columns ? width : 1);
            const float value = float(group_sum(sums(item, 0), group) / count);
            std::fill(center + group * width, center + (group + 1) * width, value);
        }
    };
    const auto sum_chunk = [&](int64_t item, int64_t chunk) {
        const int64_t size = in_columns ? cut.rows_per_chunk * columns : cut.run;
        const int64_t values = width * cut.images.positions;
        const int64_t count = in_columns ? rows_of(cut, chunk) : std::min(cut.run, values - chunk * cut.run);
        moments(item, cut.at(x, x_stride, item) + chunk * size, count, sums(item, 0, chunk));
    };
    const auto merge = [&](int64_t item) {
        const GainAndOffset parameters(cut, affine, item);
        const float* center = coefficients(item, CENTER);
        float *gain = coefficients(item, GAIN), *offset = coefficients(item, OFFSET);
        const double count = double(width) * cut.images.positions;
        for (int64_t group = 0; group < cut.item_groups; ++group) {
            double first = 0, second = 0;
            for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
                first += group_sum(sums(item, 0, chunk), group);
                second += group_sum(sums(item, 1, chunk), group);
            }
            const double difference = first / count;  // mean - center
            const double variance = second / count - difference * difference;
            const double scale = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
            const int64_t index = cut.sample(item) * cut.images.groups + cut.first_group(item) + group;
            mean[index] = float(center[group * width] + difference);
            rstd[index] = float(scale);
            for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
                const double factor = scale * parameters.gain(channel);
                gain[channel] = float(factor);
                offset[channel] = float(parameters.offset(channel) - difference * factor);
            }
        }
    };
    const auto apply = [&](int64_t item, int64_t chunk, int64_t next) {
        const float *center = coefficients(item, CENTER), *gain = coefficients(item, GAIN);
        const float* offset = coefficients(item, OFFSET);
        const S* from = cut.at(x, x_stride, item);
        S* to = cut.at(y, y_stride, item);
        const int64_t ahead = cut.at(x, x_stride, next) - from;
        if (in_columns) {
            const int64_t begin = chunk * cut.rows_per_chunk * columns;
            DISPATCH(apply_block<SILU>, from + begin, to + begin, rows_of(cut, chunk), columns, center, gain, offset,
                     ahead);
        } else {
            for_channels_of(cut, chunk, [&](int64_t channel, int64_t count, int64_t at) {
                DISPATCH(apply_run<SILU>, from + at, to + at, count, center[0], gain[channel], offset[channel],
                         ahead);
            });
        }
    };
    in_two_passes(cut, threads, find_centers, sum_chunk, merge, apply);
}

// -------------------------------------------------------------------------------------------------- backward

template <bool SILU, class S>
void backward(const Cut& cut, const S* dy, int64_t dy_stride, const S* x, int64_t x_stride, const float* mean,
              const float* rstd, const Affine& affine, S* dx, int64_t dx_stride, float* channel_sums,
              int threads) {
    enum { MEAN, GAIN, OFFSET, SLOPE, CONSTANT };
    const PerChannel<float, 5> coefficients(cut);
    const PerChannel<double, 2> sums(cut, cut.chunks);
    const int64_t columns = cut.item_channels, width = cut.group_width;
    const bool in_columns = cut.images.channels_adjacent;

    const auto statistics_index = [&](int64_t item) {
        return cut.sample(item) * cut.images.groups + cut.first_group(item);
    };
    const auto prepare = [&](int64_t item) {
        const GainAndOffset parameters(cut, affine, item);
        const int64_t first = statistics_index(item);
        float *center = coefficients(item, MEAN), *gain = coefficients(item, GAIN);
        float* offset = coefficients(item, OFFSET);
        for (int64_t channel = 0; channel < columns; ++channel) {
            const int64_t group = first + channel / width;
            center[channel] = mean[group];
            gain[channel] = float(rstd[group] * parameters.gain(channel));
            offset[channel] = float(parameters.offset(channel));
        }
    };
    const auto sum_chunk = [&](int64_t item, int64_t chunk) {
        const float *center = coefficients(item, MEAN), *gain = coefficients(item, GAIN);
        const float* offset = coefficients(item, OFFSET);
        const S *from = cut.at(x, x_stride, item), *gradient = cut.at(dy, dy_stride, item);
        double* to = sums(item, 0, chunk);
        std::fill(to, to + 2 * cut.padded, 0.0);
        if (in_columns) {
            const int64_t begin = chunk * cut.rows_per_chunk * columns;
            DISPATCH(block_gradient_sums<SILU>, from + begin, gradient + begin, rows_of(cut, chunk), columns,
                     center, gain, offset, to, cut.padded);
        } else {
            for_channels_of(cut, chunk, [&](int64_t channel, int64_t count, int64_t at) {
                double pair[2] = {0, 0};
                DISPATCH(run_gradient_sums<SILU>, from + at, gradient + at, count, center[channel],
                         gain[channel], offset[channel], pair);
                to[channel] = pair[0];
                to[cut.padded + channel] = pair[1];
            });
        }
    };
    const auto merge = [&](int64_t item) {
        const int64_t first = statistics_index(item);
        const float* gain = coefficients(item, GAIN);
        float *slope = coefficients(item, SLOPE), *constant = coefficients(item, CONSTANT);
        const int64_t begin = cut.sample(item) * cut.images.channels + cut.first_channel(item);
        float *sum_out = channel_sums + begin;
        float *product_out = sum_out + cut.images.samples * cut.images.channels;
        const double count = double(width) * cut.images.positions;
        for (int64_t group = 0; group < cut.item_groups; ++group) {
            const double scale = rstd[first + group];
            double sum = 0, product = 0;  // of gain dz and of gain dz (x - mean) over the group
            for (int64_t channel = group * width; channel < (group + 1) * width; ++channel) {
                double one = 0, two = 0;
                for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
                    one += sums(item, 0, chunk)[channel];
                    two += sums(item, 1, chunk)[channel];
                }
                sum_out[channel] = float(one);
                product_out[channel] = float(two * scale);
                sum += gain[channel] * one;
                product += gain[channel] * two;
            }
            std::fill(slope + group * width, slope + (group + 1) * width,
                      float(-scale * scale * product / count));
            std::fill(constant + group * width, constant + (group + 1) * width, float(-sum / count));
        }
    };
    const auto apply = [&](int64_t item, int64_t chunk, int64_t next) {
        const float *center = coefficients(item, MEAN), *gain = coefficients(item, GAIN);
        const float *offset = coefficients(item, OFFSET), *slope = coefficients(item, SLOPE);
        const float* constant = coefficients(item, CONSTANT);
        const S *from = cut.at(x, x_stride, item), *gradient = cut.at(dy, dy_stride, item);
        S* to = cut.at(dx, dx_stride, item);
        const int64_t ahead = cut.at(x, x_stride, next) - from;
        const int64_t dy_ahead = cut.at(dy, dy_stride, next) - gradient;
        if (in_columns) {
            const int64_t begin = chunk * cut.rows_per_chunk * columns;
            DISPATCH(block_input_gradient<SILU>, from + begin, gradient + begin, to + begin, rows_of(cut, chunk),
                     columns, center, gain, offset, slope, constant, ahead, dy_ahead);
        } else {
            for_channels_of(cut, chunk, [&](int64_t channel, int64_t count, int64_t at) {
                DISPATCH(run_input_gradient<SILU>, from + at, gradient + at, to + at, count, center[channel],
                         gain[channel], offset[channel], slope[channel], constant[channel], ahead, dy_ahead);
            });
        }
    };
    in_two_passes(cut, threads, prepare, sum_chunk, merge, apply);
}

// Calls run(pointer that has the type of the values, whether SiLU is applied as a constant).
template <class Run>
void with_types(const Images& images, const Affine& affine, const void* x, Run run) {
    with_type(images.dtype, x, [&](auto* typed) {
        using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        if constexpr (!std::is_same_v<Stored, double>)
            affine.silu ? run(typed, std::true_type()) : run(typed, std::false_type());
    });
}

}  // namespace

void group_norm_silu(const Images& images, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                     const Affine& affine, double eps, float* mean, float* rstd, int threads) {
    with_types(images, affine, x, [&](auto* typed, auto silu) {
        using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        forward<silu.value>(Cut(images), typed, x_stride, static_cast<Stored*>(y), y_stride, affine, eps, mean,
                            rstd, threads);
    });
}

void group_norm_silu_backward(const Images& images, const void* dy, int64_t dy_stride, const void* x,
                              int64_t x_stride, const float* mean, const float* rstd, const Affine& affine,
                              void* dx, int64_t dx_stride, float* sums, int threads) {
    with_types(images, affine, x, [&](auto* typed, auto silu) {
        using Stored = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
        backward<silu.value>(Cut(images), static_cast<const Stored*>(dy), dy_stride, typed, x_stride, mean, rstd,
                             affine, static_cast<Stored*>(dx), dx_stride, sums, threads);
    });
}

}  // namespace dalle2_fast::cpu
