// The steps of a diffusion sampler on the CPU, see diffusion.h.
//
// A thread takes a piece of a sample and processes it in rows: adjacent positions of one channel. The row of each
// tensor is converted to float32 in the L1 cache, where the noise is drawn, too. So a step reads and writes memory
// once. The statistics of a sample (guidance rescale, dynamic threshold) need a pass each before the step.

#include "diffusion.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "cpu/simd/processor.h"
#include "cpu/simd/storage.h"

namespace dalle2_fast::cpu {
namespace {

constexpr int64_t ROW = 512;          // positions; the rows of a step take 18 KB of the L1 cache
constexpr int64_t PADDED = ROW + 64;  // drawn noise begins up to 3 numbers earlier and ends with a whole vector

// The rows of a step's tensors; nullptr where there is none.
struct Rows {
    const float *x, *output, *unconditional, *variance_logit, *previous, *noise;
};

struct Coefficients {  // of one sample
    float guidance, output_factor;
    bool output_is_x0;
    float x_factor, sigma, x0_factor;
    float limit, shrink;
    float a, b, c, std, log_var_min, log_var_max;
};

#define BODY "cpu/diffusion_loops.h"
#include "cpu/simd/instruction_sets.h"

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// A row of a tensor, and the piece of a sample to which it belongs.
struct Place {
    int64_t piece, sample, channel, position, count;
};

constexpr int64_t ROWS_PER_PIECE = 8;

int64_t pieces_per_sample(const Shape& shape) { return divide_up(shape.positions, ROWS_PER_PIECE * ROW); }

// Calls work(place) for all rows. One thread takes all channels of a piece, so that it reads each cache line of
// channels_last from memory once.
template <class Work>
void for_rows(const Shape& shape, int threads, Work work) {
    const int64_t pieces = pieces_per_sample(shape);
    parallel_for(shape.samples * pieces, shape.elements(), threads, [&](int64_t piece) {
        const int64_t begin = piece % pieces * ROWS_PER_PIECE * ROW;
        const int64_t end = std::min(begin + ROWS_PER_PIECE * ROW, shape.positions);
        for (int64_t position = begin; position < end; position += ROW)
            for (int64_t channel = 0; channel < shape.channels; ++channel)
                work(Place{piece, piece / pieces, channel, position, std::min(ROW, end - position)});
    });
}

// The memory of a row, where that of the tensor cannot be used.
struct alignas(64) Buffer {
    float values[PADDED];
};

int64_t offset_of(const Strided& tensor, const Place& place) {
    return place.sample * tensor.sample_stride + place.channel * tensor.channel_stride +
           place.position * tensor.position_stride;
}

// Whether the loops can use the tensor's memory: it is float32, and the row consists of whole vectors.
bool is_row(const Strided& tensor, const Place& place) {
    return tensor.dtype == DType::f32 && tensor.position_stride == 1 && place.count == ROW;
}

// Calls run(typed pointer to the row's first value).
template <class Run>
void with_values(const Strided& tensor, const Place& place, Run run) {
    with_type(tensor.dtype, tensor.data, [&](auto* data) {
        if constexpr (!std::is_same_v<decltype(data), double*>) run(data + offset_of(tensor, place));
    });
}

// A row as float32, in the buffer unless the tensor's memory can be used.
const float* read_row(const Strided& tensor, const Place& place, Buffer& buffer) {
    if (!tensor.data) return nullptr;
    if (is_row(tensor, place)) return static_cast<const float*>(tensor.data) + offset_of(tensor, place);
    with_values(tensor, place, [&](auto* from) {
        std::remove_pointer_t<decltype(from)> adjacent[ROW];
        if (tensor.position_stride != 1) {
            for (int64_t i = 0; i < place.count; ++i) adjacent[i] = from[i * tensor.position_stride];
            from = adjacent;
        }
        DISPATCH(to_row, from, place.count, buffer.values);
    });
    return buffer.values;
}

// Where the loops write a row; write_row then brings it into the tensor.
float* result_row(const Strided& tensor, const Place& place, Buffer& buffer) {
    if (is_row(tensor, place)) return static_cast<float*>(tensor.data) + offset_of(tensor, place);
    return buffer.values;
}

void write_row(const Strided& tensor, const Place& place, const float* row) {
    with_values(tensor, place, [&](auto* to) {
        if (static_cast<const void*>(row) == to) return;
        if (tensor.position_stride == 1) {
            DISPATCH(from_row, row, place.count, to);
            return;
        }
        std::remove_pointer_t<decltype(to)> adjacent[ROW];
        DISPATCH(from_row, row, place.count, adjacent);
        for (int64_t i = 0; i < place.count; ++i) to[i * tensor.position_stride] = adjacent[i];
    });
}

const float* draw_row(const Seeds& seeds, const Shape& shape, const Place& place, Buffer& buffer) {
    const int64_t first = place.channel * shape.positions + place.position, skipped = first % 4;
    DISPATCH(normal_numbers, uint64_t(seeds.values[place.sample]), uint64_t(seeds.step), uint64_t(first / 4),
             skipped + place.count, buffer.values);
    return buffer.values + skipped;
}

// ------------------------------------------------------------------------------------------------------ step

struct StepBuffers {
    Buffer x, output, unconditional, variance_logit, previous, noise;
};

// The rows that x0 depends on.
Rows read_prediction(const StepTensors& tensors, const Place& place, StepBuffers& buffers) {
    return {read_row(tensors.x, place, buffers.x),
            read_row(tensors.output, place, buffers.output),
            read_row(tensors.unconditional, place, buffers.unconditional),
            nullptr,
            nullptr,
            nullptr};
}

// The coefficients of each sample, without the statistics of its values.
std::vector<Coefficients> sample_coefficients(const Shape& shape, const StepOptions& options) {
    const float* row = options.row;
    Coefficients k{};
    k.output_factor = 1;
    k.output_is_x0 = options.prediction == Prediction::sample;
    const bool is_epsilon = options.prediction == Prediction::epsilon;
    k.x_factor = is_epsilon ? 1 : row[0];
    k.sigma = row[1];
    k.x0_factor = is_epsilon ? 1 / row[0] : 1;
    k.limit = float(options.bound);
    k.shrink = 1;
    k.a = row[2], k.b = row[3], k.c = row[4], k.std = row[5];
    k.log_var_min = row[6], k.log_var_max = row[7];
    k.guidance = float(options.guidance_number);
    std::vector<Coefficients> each(shape.samples, k);
    if (options.guidance)
        for (int64_t sample = 0; sample < shape.samples; ++sample)
            each[sample].guidance = options.guidance[sample * options.guidance_stride];
    return each;
}

struct Moments {
    double count = 0, mean = 0, squares = 0;  // squares: the sum of the squared deviations from the mean

    void add(const float* row, int64_t row_count) {
        double sum, sum_of_squares;
        DISPATCH(shifted_sums, row, row_count, &sum, &sum_of_squares);
        const double n = double(row_count);
        add({n, row[0] + sum / n, sum_of_squares - sum * sum / n});
    }
    void add(const Moments& other) {  // Chan, Golub, LeVeque 1979
        const double together = count + other.count, difference = other.mean - mean;
        mean += difference * other.count / together;
        squares += other.squares + difference * difference * count * other.count / together;
        count = together;
    }
    double deviation() const { return std::sqrt(squares / (count - 1)); }
};

// output_factor = r std(conditional) / std(guided) + 1 - r     (Lin et al., 2305.08891, equations 15 and 16)
void find_factors(const Shape& shape, StepTensors tensors, double rescale, int threads,
                  std::vector<Coefficients>& coefficients) {
    tensors.x.data = nullptr;  // it is not needed
    struct Pair {
        Moments conditional, guided;
    };
    const int64_t pieces = pieces_per_sample(shape);
    std::vector<Pair> parts(shape.samples * pieces);
    for_rows(shape, threads, [&](const Place& place) {
        StepBuffers buffers;
        Buffer guided;
        const Rows rows = read_prediction(tensors, place, buffers);
        DISPATCH(guide, rows, coefficients[place.sample], place.count, guided.values);
        parts[place.piece].conditional.add(rows.output, place.count);
        parts[place.piece].guided.add(guided.values, place.count);
    });
    for (int64_t sample = 0; sample < shape.samples; ++sample) {
        Pair all;
        for (int64_t piece = sample * pieces; piece < (sample + 1) * pieces; ++piece) {
            all.conditional.add(parts[piece].conditional);
            all.guided.add(parts[piece].guided);
        }
        const double guided = all.guided.deviation(), tiny = std::numeric_limits<float>::min();
        const double ratio = all.conditional.deviation() / (guided < tiny ? tiny : guided);
        coefficients[sample].output_factor = float(rescale * ratio + (1 - rescale));
    }
}

// The bits of numbers >= 0 have the order of the numbers, with infinity and then NaN at the end.
float number_of(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// The quantile of numbers >= 0, given by their bits, with the linear interpolation of torch.lerp.
float quantile_of(const uint32_t* bits, int64_t count, double quantile) {
    constexpr int SHIFT = 19;  // a bucket holds the numbers whose exponent and first four digits are equal
    const double position = quantile * double(count - 1);
    const int64_t rank = std::min(int64_t(position), count - 1);
    int64_t sizes[1 << (32 - SHIFT)] = {};
    for (int64_t i = 0; i < count; ++i) ++sizes[bits[i] >> SHIFT];
    uint32_t bucket = 0;
    int64_t before = 0;
    while (before + sizes[bucket] <= rank) before += sizes[bucket++];

    std::vector<uint32_t> candidates;
    candidates.reserve(sizes[bucket]);
    uint32_t above = std::numeric_limits<uint32_t>::max();  // the smallest number of the buckets that follow
    for (int64_t i = 0; i < count; ++i) {
        if (bits[i] >> SHIFT == bucket) candidates.push_back(bits[i]);
        if (bits[i] >> SHIFT > bucket) above = std::min(above, bits[i]);
    }
    const auto chosen = candidates.begin() + (rank - before);
    std::nth_element(candidates.begin(), chosen, candidates.end());
    const float lower = number_of(*chosen);
    if (rank + 1 == count) return lower;
    const auto following = std::min_element(chosen + 1, candidates.end());
    const float difference = number_of(following == candidates.end() ? above : *following) - lower;
    const float weight = float(position - double(rank));
    return weight < 0.5f ? lower + weight * difference : (lower + difference) - difference * (1 - weight);
}

// limit = max(quantile of |x0|, bound), shrink = bound / limit      (Saharia et al., 2205.11487, section 2.3)
void find_limits(const Shape& shape, const StepTensors& tensors, const StepOptions& options, int threads,
                 std::vector<Coefficients>& coefficients) {
    const int64_t size = shape.channels * shape.positions;
    const std::unique_ptr<uint32_t[]> magnitudes(new uint32_t[shape.elements()]);
    for_rows(shape, threads, [&](const Place& place) {
        StepBuffers buffers;
        Buffer x0;
        const Rows rows = read_prediction(tensors, place, buffers);
        DISPATCH(predict_x0, rows, coefficients[place.sample], place.count, x0.values);
        const int64_t first = place.sample * size + place.channel * shape.positions + place.position;
        uint32_t* to = magnitudes.get() + first;
        std::memcpy(to, x0.values, place.count * sizeof *to);
        for (int64_t i = 0; i < place.count; ++i) to[i] &= 0x7fffffffu;
    });
    parallel_for(shape.samples, shape.elements(), threads, [&](int64_t sample) {
        Coefficients& k = coefficients[sample];
        const float bound = float(options.bound);
        const float quantile = quantile_of(magnitudes.get() + sample * size, size, options.quantile);
        k.limit = quantile < bound ? bound : quantile;  // NaN stays NaN
        k.shrink = bound / k.limit;
    });
}

}  // namespace

void sample_noise(const Shape& shape, const Strided& noise, const Seeds& seeds, int threads) {
    for_rows(shape, threads, [&](const Place& place) {
        Buffer buffer;
        write_row(noise, place, draw_row(seeds, shape, place, buffer));
    });
}

void add_noise(const Shape& shape, const Strided& x0, const float* alpha, const float* sigma,
               const Strided& noise, const Seeds& seeds, const Strided& x_t, int threads) {
    for_rows(shape, threads, [&](const Place& place) {
        Buffer x0_buffer, noise_buffer, result_buffer;
        if (seeds.values) write_row(noise, place, draw_row(seeds, shape, place, noise_buffer));
        const float* clean = read_row(x0, place, x0_buffer);
        const float* added = read_row(noise, place, noise_buffer);  // as it was rounded
        float* result = result_row(x_t, place, result_buffer);
        DISPATCH(weighted_sum, alpha[place.sample], clean, sigma[place.sample], added, place.count, result);
        write_row(x_t, place, result);
    });
}

void diffusion_step(const Shape& shape, const StepTensors& tensors, const Seeds& seeds,
                    const StepOptions& options, int threads) {
    std::vector<Coefficients> coefficients = sample_coefficients(shape, options);
    if (options.guidance_rescale > 0)
        find_factors(shape, tensors, options.guidance_rescale, threads, coefficients);
    if (options.quantile > 0) find_limits(shape, tensors, options, threads, coefficients);
    // Most samplers have std = 0 in the last step. With a learned range a std of NaN counts as 0, too.
    const float std = coefficients[0].std;
    const bool noisy = seeds.values && (tensors.variance_logit.data ? std > 0 : std != 0);
    for_rows(shape, threads, [&](const Place& place) {
        StepBuffers buffers;
        Buffer next_buffer, x0_buffer;
        Rows rows = read_prediction(tensors, place, buffers);
        rows.previous = read_row(tensors.previous, place, buffers.previous);
        if (noisy) {
            rows.noise = draw_row(seeds, shape, place, buffers.noise);
            rows.variance_logit = read_row(tensors.variance_logit, place, buffers.variance_logit);
        }
        float* next = result_row(tensors.next, place, next_buffer);
        float* x0 = result_row(tensors.x0, place, x0_buffer);
        DISPATCH(update, rows, coefficients[place.sample], place.count, next, x0);
        write_row(tensors.next, place, next);
        write_row(tensors.x0, place, x0);
    });
}

}  // namespace dalle2_fast::cpu
