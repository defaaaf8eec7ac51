// How matrices lie in memory for cpu/simd/multiply.h, and the memory of a thread.
#pragma once

#include <cstdint>
#include <vector>

namespace dalle2_fast::cpu {

constexpr int64_t PADDING = 16;  // floats of the longest vector

inline int64_t padded(int64_t columns) { return (columns + PADDING - 1) / PADDING * PADDING; }

// The right matrix of a product is cut into panels of columns, each of which lies together: of 48, or of 32 where
// 16 would remain. left: the columns that are left, a multiple of 16.
inline int64_t panel_width(int64_t left) { return left == 64 || left == 32 ? 32 : left == 16 ? 16 : 48; }

// At least `count` floats, 0 at first, aligned to cache lines. A thread keeps its memory for the next call: new
// pages would cost more time than what they are used for.
class Floats {
public:
    float* at_least(int64_t count) {
        if (int64_t(memory_.size()) < count + 16) memory_.assign(count + 16, 0.0f);
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
        return reinterpret_cast<float*>((address + 63) / 64 * 64);
    }

private:
    std::vector<float> memory_;
};

}  // namespace dalle2_fast::cpu
