// The unmodified csrc/sm90/contrastive.cu on the modelled hardware, for tests/csrc/test_sm90.py to call by
// ctypes.
#include <sm90/contrastive.cu>

using namespace dalle2_fast;

namespace {

template <class Call>
const char* guarded(Call call) {  // the message of what it throws, or nullptr
    static std::string message;
    try {
        call();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace

extern "C" {

struct Matrices {
    const void *image, *text;
    int64_t image_stride, text_stride, rows, columns, width, diagonal_offset;
    int dtype;
};

sm90::Features features(const Matrices* from) {
    return {from->image, from->text,            from->image_stride,
            from->text_stride, from->rows,      from->columns,
            from->width, from->diagonal_offset, static_cast<DType>(from->dtype)};
}

void configure(int clusters, bool late_copies, bool late_products, bool descending, int64_t partial_bytes) {
    sm90::machine::options = {clusters, late_copies, late_products, descending, nullptr};
    cuda_on_cpu::descending = descending;
    sm90::PARTIAL_BYTES = partial_bytes;
}
void set_why_device_unavailable(const char* reason) { sm90::machine::options.why_unavailable = reason; }

const char* why_unavailable(const Matrices* from) { return sm90::why_unavailable(features(from)); }
int64_t workspace_bytes(int64_t rows, int64_t columns, int64_t width) {
    return sm90::workspace_bytes(rows, columns, width);
}
const char* lse(const Matrices* from, const float* scale, double* row_lse, double* column_lse,
                float* positive_products, void* workspace) {
    return guarded([&] {
        sm90::lse(features(from), scale, row_lse, column_lse, positive_products, workspace, nullptr);
    });
}
const char* gradient(const Matrices* from, const float* scale, const double* row_lse,
                     const double* column_lse, float row_weight, float column_weight, void* gradient,
                     int64_t stride, double* sums, void* workspace) {
    return guarded([&] {
        sm90::gradient(features(from), scale, row_lse, column_lse, row_weight, column_weight, gradient,
                       stride, sums, workspace, nullptr);
    });
}
const char* sigmoid(const Matrices* from, const float* scale, const float* bias, void* gradient,
                    int64_t stride, double* sums, void* workspace) {
    return guarded(
        [&] { sm90::sigmoid(features(from), scale, bias, gradient, stride, sums, workspace, nullptr); });
}

}  // extern "C"
