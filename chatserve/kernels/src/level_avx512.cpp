// AVX-512 with VNNI: the server processors since 2019, AMD's since Zen 4.
#include "simd_avx512.h"

#include "level_kernels.h"

namespace {

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const chatserve::LevelKernels chatserve::kAvx512 = level_kernels("avx512vnni", is_supported);
