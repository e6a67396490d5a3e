// Row passes over a tile of raw logits: pass 1 reduces each row to (max, log-sum, logp, mean) reading memory once;
// pass 2 turns the row into its gradient. Neither ever stores normalized logits or probabilities beside the tile.
// Compiled once per instruction set (FASTRL_ISA names the build). Only inlined code here: an inline function of the
// standard library compiled for AVX-512 could be the copy that the linker keeps for every build.
#include "rows.h"

#include "../row_math.h"

namespace fastrl {
namespace {

constexpr int64_t kBlock = 2048;  // columns held in L1 between the maximum and the sum

template <typename T, bool kBias, bool kCap>
void stats_rows(const StatsArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulator<T>::type;
  const Logit<A> logit(a.transform);
  const A neg_inf = -static_cast<A>(__builtin_inf());
  A block[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.tile) + row * a.stride;
    Partial<A, double> total;
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t size = a.cols - start < kBlock ? a.cols - start : kBlock;
      A block_max = neg_inf;
#pragma omp simd reduction(max : block_max)
      for (int64_t j = 0; j < size; ++j) {
        A unused;
        const A z = logit.template operator()<kBias, kCap>(load(x + start + j), start + j, unused);
        block[j] = z;
        block_max = z > block_max ? z : block_max;
      }
      total.raise(block_max);
      total.add(block, size);
    }
    total.write(a, row, logit.template of_token<kCap>(x, a.ids[row], a.cols));
  }
}

template <typename T, bool kBias, bool kCap, bool kEntropy>
void grad_rows(const GradArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulator<T>::type;
  const Logit<A> logit(a.transform);
  A block[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = a.source ? a.source[i] : i;
    const int64_t to = a.target ? a.target[i] : i;
    const T* x = static_cast<const T*>(a.tile) + from * a.stride;
    T* out = static_cast<T*>(a.out) + to * a.out_stride;
    const RowGradient<A> gradient(a, from);
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t size = a.cols - start < kBlock ? a.cols - start : kBlock;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) {
        A slope;
        const A z = logit.template operator()<kBias, kCap>(load(x + start + j), start + j, slope);
        block[j] = gradient.template operator()<kEntropy>(z, slope);
      }
      if (gradient.id >= start && gradient.id < start + size) {
        A slope;
        logit.template operator()<kBias, kCap>(load(x + gradient.id), gradient.id, slope);
        block[gradient.id - start] += gradient.g_logp * slope;
      }
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) store(out + start + j, block[j]);
    }
  }
}

template <typename T>
void stats_typed(const StatsArgs& a, int64_t begin, int64_t end) {
  const bool bias = a.transform.bias != nullptr, cap = a.transform.softcap > 0;
  auto* f = bias ? (cap ? stats_rows<T, true, true> : stats_rows<T, true, false>)
                 : (cap ? stats_rows<T, false, true> : stats_rows<T, false, false>);
  f(a, begin, end);
}

template <typename T, bool kEntropy>
void grad_typed(const GradArgs& a, int64_t begin, int64_t end) {
  const bool bias = a.transform.bias != nullptr, cap = a.transform.softcap > 0;
  auto* f = bias ? (cap ? grad_rows<T, true, true, kEntropy> : grad_rows<T, true, false, kEntropy>)
                 : (cap ? grad_rows<T, false, true, kEntropy> : grad_rows<T, false, false, kEntropy>);
  f(a, begin, end);
}

template <typename T>
void grad_typed(const GradArgs& a, int64_t begin, int64_t end) {
  a.grad_entropy ? grad_typed<T, true>(a, begin, end) : grad_typed<T, false>(a, begin, end);
}

void stats(const StatsArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat32: return stats_typed<float>(a, begin, end);
    case DType::kFloat64: return stats_typed<double>(a, begin, end);
    case DType::kBFloat16: return stats_typed<BFloat16>(a, begin, end);
    case DType::kFloat16: return stats_typed<Float16>(a, begin, end);
  }
}

void grad(const GradArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat32: return grad_typed<float>(a, begin, end);
    case DType::kFloat64: return grad_typed<double>(a, begin, end);
    case DType::kBFloat16: return grad_typed<BFloat16>(a, begin, end);
    case DType::kFloat16: return grad_typed<Float16>(a, begin, end);
  }
}

}  // namespace

#define FASTRL_JOIN2(a, b) a##b
#define FASTRL_JOIN(a, b) FASTRL_JOIN2(a, b)
#define FASTRL_TEXT2(a) #a
#define FASTRL_TEXT(a) FASTRL_TEXT2(a)

const RowKernels& FASTRL_JOIN(row_kernels_, FASTRL_ISA)() {
  static const RowKernels kernels{FASTRL_TEXT(FASTRL_ISA), stats, grad, FASTRL_JOIN(policy_terms_, FASTRL_ISA),
                                  FASTRL_JOIN(divergence_, FASTRL_ISA), FASTRL_JOIN(surrogate_terms_, FASTRL_ISA),
                                  FASTRL_JOIN(covariance_sums_, FASTRL_ISA), FASTRL_JOIN(covariances_, FASTRL_ISA)};
  return kernels;
}

}  // namespace fastrl
