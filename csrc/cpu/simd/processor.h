// The instruction set that the loops on this processor use, and its name for `dalle2-fast info`.
#pragma once

namespace dalle2_fast::cpu {

enum class InstructionSet { portable, avx2, avx512, avx512_bf16 };

inline InstructionSet find_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
    if (avx2) return InstructionSet::avx2;
#endif
    return InstructionSet::portable;
}

inline InstructionSet& instruction_set() {
    static InstructionSet chosen = find_instruction_set();
    return chosen;
}

// Tests choose a set that the processor has but would not use; a better one than it has is refused.
inline bool choose_instruction_set(InstructionSet wanted) {
    if (int(wanted) > int(find_instruction_set())) return false;
    instruction_set() = wanted;
    return true;
}

}  // namespace dalle2_fast::cpu
