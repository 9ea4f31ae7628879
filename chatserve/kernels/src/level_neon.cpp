// NEON with the dot product extension: Apple silicon, and ARMv8.2 servers.
#include "simd_neon.h"

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

using Simd = NeonSimd;

}  // namespace

#include "level_kernels.h"

namespace {

bool is_supported() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1 << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct;
#else
  return true;  // every Apple processor that runs macOS has it
#endif
}

}  // namespace

const chatserve::LevelKernels chatserve::kNeon = level_kernels("neon", is_supported);
