// Takes the place of memory.cpp in the driver: a buffer ends at a page that nothing may touch, and
// none of it remains when it is freed.
#include <sys/mman.h>

#include <cstdint>

#include "memory.h"

namespace chatserve {
namespace {

constexpr size_t kPage = 64 << 10;  // no system has larger ones by default
constexpr size_t kLine = 64;

size_t rounded(size_t num_bytes, size_t unit) { return (num_bytes + unit - 1) / unit * unit; }

}  // namespace

void* allocate_pages(size_t num_bytes) {
  const size_t room = rounded(num_bytes, kPage);
  void* raw = mmap(nullptr, room + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(raw);
  mprotect(start + room, kPage, PROT_NONE);
  return start + room - rounded(num_bytes, kLine);
}

void free_pages(void* pages, size_t num_bytes) {
  if (!pages) return;
  const size_t room = rounded(num_bytes, kPage);
  munmap(static_cast<char*>(pages) + rounded(num_bytes, kLine) - room, room + kPage);
}

// Touches everything, as the real one may.
void commit_pages(void* pages, size_t num_bytes) {
  volatile char* bytes = static_cast<char*>(pages);
  for (size_t at = 0; at < num_bytes; at += kPage) bytes[at] = bytes[at];
}

}  // namespace chatserve
