// Row passes over a tile of raw logits: pass 1 reduces each row to (max, log-sum, logp, mean) reading memory once;
// pass 2 turns the row into its gradient. Neither ever stores normalized logits or probabilities beside the tile.
// Compiled once per instruction set (FASTRL_ISA names the build). Only inlined code here: an inline function of the
// standard library compiled for AVX-512 could be the copy that the linker keeps for every build.
#include "rows.h"

#include <math.h>
#include <string.h>

#include "../vector_math.h"

namespace fastrl {
namespace {

constexpr int64_t kBlock = 2048;  // columns held in L1 between the maximum and the sum
constexpr int64_t kStrip = 256;   // columns summed in A before they enter the double: bounds the rounding of long rows

struct BFloat16 {
  uint16_t bits;
};

FASTRL_FN float load(const float* p) { return *p; }
FASTRL_FN double load(const double* p) { return *p; }
FASTRL_FN float load(const BFloat16* p) { return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16); }
FASTRL_FN void store(float* p, float x) { *p = x; }
FASTRL_FN void store(double* p, double x) { *p = x; }
FASTRL_FN void store(BFloat16* p, float x) {  // to nearest, ties to even; a NaN stays one
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <typename A>
struct Logit {
  const A* bias;
  A scale, inv_cap, cap, inv_temperature;
  explicit Logit(const Transform& t)
      : bias(static_cast<const A*>(t.bias)),
        scale(static_cast<A>(t.softcap > 0 ? t.logit_scale : t.logit_scale / t.temperature)),
        inv_cap(static_cast<A>(t.softcap > 0 ? 1.0 / t.softcap : 0.0)),
        cap(static_cast<A>(t.softcap > 0 ? t.softcap / t.temperature : 0.0)),
        inv_temperature(static_cast<A>(1.0 / t.temperature)) {}

  // The logit of one column; `slope` receives d logit / d product.
  template <bool kBias, bool kCap>
  __attribute__((always_inline)) A operator()(A product, int64_t column, A& slope) const {
    if (kBias) product += bias[column];
    if (!kCap) {
      slope = scale;
      return product * scale;
    }
    const A t = tanh_of(product * scale * inv_cap);
    slope = (A(1) - t * t) * scale * inv_temperature;
    return cap * t;
  }
};

template <typename T, bool kBias, bool kCap>
void stats_rows(const StatsArgs& a, int64_t begin, int64_t end) {
  using A = typename Accumulator<T>::type;
  const Logit<A> logit(a.transform);
  const A neg_inf = -__builtin_inf();
  A block[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.tile) + row * a.stride;
    A row_max = neg_inf;
    double sum = 0.0, weighted = 0.0;  // sum of e^(z - max), and of e^(z - max) (z - max)
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t size = a.cols - start < kBlock ? a.cols - start : kBlock;
      A block_max = neg_inf;
#pragma omp simd reduction(max : block_max)
      for (int64_t j = 0; j < size; ++j) {
        A slope;
        const A z = logit.template operator()<kBias, kCap>(load(x + start + j), start + j, slope);
        block[j] = z;
        block_max = z > block_max ? z : block_max;
      }
      if (block_max > row_max) {
        if (row_max != neg_inf) {
          const double shift = static_cast<double>(row_max) - static_cast<double>(block_max);
          const double rescale = exp(shift);
          weighted = rescale * (weighted + sum * shift);
          sum *= rescale;
        }
        row_max = block_max;
      }
      // While every logit so far is -inf, shifting by 0 keeps -inf - (-inf) = NaN out of the sums; a NaN logit still
      // arrives there through exp.
      const A shift = row_max == neg_inf ? A(0) : row_max;
      for (int64_t strip = 0; strip < size; strip += kStrip) {
        const int64_t strip_end = size - strip < kStrip ? size : strip + kStrip;
        A strip_sum = 0, strip_weighted = 0;
#pragma omp simd reduction(+ : strip_sum, strip_weighted)
        for (int64_t j = strip; j < strip_end; ++j) {
          const A d = block[j] - shift;
          const A e = exp_of(d);
          strip_sum += e;
          strip_weighted += e * (d < A(-1e30) ? A(-1e30) : d);
        }
        sum += strip_sum;
        weighted += strip_weighted;
      }
    }
    const A log_sum = static_cast<A>(log(sum));
    static_cast<A*>(a.row_max)[row] = row_max;
    static_cast<A*>(a.log_sum)[row] = log_sum;
    const int64_t id = a.ids[row];
    A slope, logp = neg_inf;
    if (id >= 0) {
      const A z = logit.template operator()<kBias, kCap>(load(x + id), id, slope);
      logp = (z - row_max) - log_sum;
    }
    // All -inf (0/0) and +inf (inf - inf) rows are NaN, as log_softmax has them.
    if (!(sum > 0.0) || row_max == -neg_inf) logp = static_cast<A>(__builtin_nan(""));
    static_cast<A*>(a.logps)[row] = logp;
    if (a.mean) static_cast<A*>(a.mean)[row] = static_cast<A>(weighted / sum);
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
    const A row_max = static_cast<const A*>(a.row_max)[from];
    const A log_sum = static_cast<const A*>(a.log_sum)[from];
    const A g_logp = a.grad_logps ? static_cast<const A*>(a.grad_logps)[from] : A(0);
    const A g_lse = a.grad_lse ? static_cast<const A*>(a.grad_lse)[from] : A(0);
    const A g_entropy = kEntropy ? static_cast<const A*>(a.grad_entropy)[from] : A(0);
    const A mean = kEntropy ? static_cast<const A*>(a.mean)[from] : A(0);
    const A g_prob = g_lse - g_logp;
    const int64_t id = a.ids[from];
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t size = a.cols - start < kBlock ? a.cols - start : kBlock;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) {
        A slope;
        const A z = logit.template operator()<kBias, kCap>(load(x + start + j), start + j, slope);
        const A shifted = z - row_max;
        A g = g_prob;
        if (kEntropy) g -= g_entropy * ((shifted < A(-1e30) ? A(-1e30) : shifted) - mean);  // log p + H
        block[j] = exp_of(shifted - log_sum) * g * slope;
      }
      if (id >= start && id < start + size) {
        A slope;
        logit.template operator()<kBias, kCap>(load(x + id), id, slope);
        block[id - start] += g_logp * slope;
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
  }
}

void grad(const GradArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::kFloat32: return grad_typed<float>(a, begin, end);
    case DType::kFloat64: return grad_typed<double>(a, begin, end);
    case DType::kBFloat16: return grad_typed<BFloat16>(a, begin, end);
  }
}

}  // namespace

#define FASTRL_JOIN2(a, b) a##b
#define FASTRL_JOIN(a, b) FASTRL_JOIN2(a, b)
#define FASTRL_TEXT2(a) #a
#define FASTRL_TEXT(a) FASTRL_TEXT2(a)

const RowKernels& FASTRL_JOIN(row_kernels_, FASTRL_ISA)() {
  static const RowKernels kernels{FASTRL_TEXT(FASTRL_ISA), stats, grad};
  return kernels;
}

}  // namespace fastrl
