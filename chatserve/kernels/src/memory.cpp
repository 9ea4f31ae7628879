#include "memory.h"

#include <sys/mman.h>

#include <cstdint>

namespace chatserve {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded(size_t num_bytes) {
  const size_t unit = num_bytes >= kHugePage ? kHugePage : 4096;
  return (num_bytes + unit - 1) / unit * unit;
}

}  // namespace

void* allocate_pages(size_t num_bytes) {
  const size_t size = rounded(num_bytes);
  const bool is_large = size >= kHugePage;
  // a huge page must be aligned to its size: take one more and give the ends back
  const size_t taken = is_large ? size + kHugePage : size;
  void* raw = mmap(nullptr, taken, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  if (!is_large) return raw;
  const uintptr_t start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) munmap(raw, aligned - start);
  const uintptr_t end = start + taken, used = aligned + size;
  if (end > used) munmap(reinterpret_cast<void*>(used), end - used);
#if defined(MADV_HUGEPAGE)
  madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
#endif
  return reinterpret_cast<void*>(aligned);
}

void free_pages(void* pages, size_t num_bytes) {
  if (pages) munmap(pages, rounded(num_bytes));
}

void commit_pages(void* pages, size_t num_bytes) {
#if defined(MADV_POPULATE_WRITE)
  madvise(pages, rounded(num_bytes), MADV_POPULATE_WRITE);
#elif defined(__linux__)
  madvise(pages, rounded(num_bytes), 23);  // Linux 5.14, in older headers; refused before
#else
  (void)pages;
  (void)num_bytes;
#endif
}

}  // namespace chatserve
