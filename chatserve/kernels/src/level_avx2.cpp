// AVX2 with FMA and F16C: every x86 processor since 2013 (Intel) and 2017 (AMD).
#include "simd_avx2.h"

#include "level_kernels.h"

namespace {

bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const chatserve::LevelKernels chatserve::kAvx2 = level_kernels("avx2", is_supported);
