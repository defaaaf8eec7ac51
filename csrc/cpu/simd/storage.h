// The types in which values are stored, without arithmetic, and the choice of a type by its code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "contrastive.h"  // DType

namespace dalle2_fast::cpu {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Calls visit(data as a typed pointer). Data is `const void*` or `void*`.
template <class Data, class Visit>
void with_type(DType dtype, Data* data, Visit visit) {
    constexpr bool is_const = std::is_const_v<Data>;
    switch (dtype) {
        case DType::f32: visit(static_cast<std::conditional_t<is_const, const float, float>*>(data)); break;
        case DType::f64: visit(static_cast<std::conditional_t<is_const, const double, double>*>(data)); break;
        case DType::f16: visit(static_cast<std::conditional_t<is_const, const Float16, Float16>*>(data)); break;
        case DType::bf16: visit(static_cast<std::conditional_t<is_const, const BFloat16, BFloat16>*>(data)); break;
    }
}

}  // namespace dalle2_fast::cpu
