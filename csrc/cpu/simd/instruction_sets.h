// Compiles BODY, a file of inner loops, once per instruction set: each time in another namespace and with another
// VECTOR_BYTES. There is no include guard, because several .cpp files use it:
//
//     #define BODY "cpu/contrastive_slab.h"
//     #include "cpu/simd/instruction_sets.h"
//     ... DISPATCH(sum_slab, arguments) calls sum_slab of the best set that this processor has.
//
// With LARGEST_VECTOR_BYTES 32 before the #include, AVX-512 is left out.
//
// AVX512-BF16 adds one instruction, the conversion of float32 to bfloat16.
//
// The portable set is what the compiler makes of 16-byte vectors: SSE2 on x86-64, NEON on aarch64.

namespace portable {
#define VECTOR_BYTES 16
#include BODY
#undef VECTOR_BYTES
}  // namespace portable

#if defined(__x86_64__) && defined(__GNUC__)

#ifndef LARGEST_VECTOR_BYTES
#define LARGEST_VECTOR_BYTES 64
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define VECTOR_BYTES 32
#include BODY
#undef VECTOR_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if LARGEST_VECTOR_BYTES >= 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace avx512 {
#define VECTOR_BYTES 64
#include BODY
#undef VECTOR_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace avx512_bf16 {
#define VECTOR_BYTES 64
#define HAS_BF16_CONVERSION
#include BODY
#undef HAS_BF16_CONVERSION
#undef VECTOR_BYTES
}  // namespace avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace avx512 = avx2;
namespace avx512_bf16 = avx2;
#endif

#define DISPATCH(function, ...)                                                                \
    (instruction_set() == InstructionSet::avx512_bf16 ? avx512_bf16::function(__VA_ARGS__)     \
     : instruction_set() == InstructionSet::avx512    ? avx512::function(__VA_ARGS__)          \
     : instruction_set() == InstructionSet::avx2      ? avx2::function(__VA_ARGS__)            \
                                                      : portable::function(__VA_ARGS__))
#else
#define DISPATCH(function, ...) portable::function(__VA_ARGS__)
#endif
