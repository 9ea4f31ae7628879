/* Reads memory and does as little else as possible; compiled and called by bandwidth.py. */
#include <stddef.h>
#include <stdint.h>

/* The xor of all words: the compiler may not leave a read out. num_words: a multiple of 64. */
uint64_t read_all(const uint64_t *words, size_t num_words) {
  uint64_t lanes[64] = {0};
  for (size_t i = 0; i < num_words; i += 64) {
    for (size_t lane = 0; lane < 64; lane++) lanes[lane] ^= words[i + lane];
  }
  uint64_t all = 0;
  for (size_t lane = 0; lane < 64; lane++) all ^= lanes[lane];
  return all;
}
