// What the passes over (B, T) vectors share: a strip of a row at a time, in place or spread over a buffer.
#pragma once

#include <cstdint>

#include "../vector_math.h"

namespace fastrl {
namespace {

constexpr int64_t kStrip = 256;  // tokens whose terms are summed in A before they enter the double

// exp that overflows to inf where exp_of stays finite.
template <typename A>
__attribute__((always_inline)) inline A exp_to_inf(A x) {
  const A limit = sizeof(A) == 8 ? A(709) : A(88);
  const bool large = x > limit;
  const A e = exp_of(large ? x * A(0.5) : x);
  return large ? e * e : e;
}

// The strip of a vector that starts at (row, start): in place, or spread over `buffer` where it has one value per row or none.
template <typename A>
const A* strip_of(const void* vector, bool per_row, A fallback, int64_t row, int64_t cols, int64_t start, A* buffer) {
  const A* x = static_cast<const A*>(vector);
  if (x && !per_row) return x + row * cols + start;
  const A value = x ? x[row] : fallback;
  for (int64_t j = 0; j < kStrip; ++j) buffer[j] = value;
  return buffer;
}

template <typename A>
A* output_of(void* out, int64_t offset, A* scratch) {
  return out ? static_cast<A*>(out) + offset : scratch;
}

}  // namespace
}  // namespace fastrl
