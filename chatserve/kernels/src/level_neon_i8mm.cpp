// NEON with the matrix product of bytes: Apple's M2 and later, and ARMv8.6 servers.
#include "simd_neon_i8mm.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "level_kernels.h"

namespace {

bool is_supported() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1 << 20;     // HWCAP_ASIMDDP
  constexpr unsigned long kMatrixProduct = 1 << 13;  // HWCAP2_I8MM
  return getauxval(AT_HWCAP) & kDotProduct && getauxval(AT_HWCAP2) & kMatrixProduct;
#elif defined(__APPLE__)
  int has_it = 0;
  size_t size = sizeof has_it;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has_it, &size, nullptr, 0) == 0 && has_it;
#else
  return false;
#endif
}

}  // namespace

const chatserve::LevelKernels chatserve::kNeonI8mm = level_kernels("neoni8mm", is_supported);
