// The arithmetic of the two row passes, written once for the C++ and the CUDA kernels, whose drivers differ in how a row is
// cut: the CPU takes blocks that stay in L1, a CUDA thread blocks that stay in its registers. Everything is inlined: a
// function compiled for one instruction set must not become the linker's copy for all of them.
//
// Both passes compute a logit by the same operations in the same order, and the builds never contract them into fused
// multiply-adds, so a logit has the same bits in both; where an operation is to be fused, `mul_add` says so.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "rows.h"
#include "vector_math.h"

namespace fastrl {
namespace {

constexpr int64_t kStrip = 256;  // columns summed in A before they enter the sums of the row: bounds the rounding of long rows

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTRL_FN float load(const float* p) { return *p; }
FASTRL_FN double load(const double* p) { return *p; }
FASTRL_FN float load(const BFloat16* p) { return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16); }
FASTRL_FN float load(const Float16* p) {
#if defined(FASTRL_ON_DEVICE)
  return __half2float(__ushort_as_half(p->bits));
#else
  const uint32_t magnitude = p->bits & 0x7fffu, sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const float finite = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;  // exact, subnormals too
  const uint32_t u = magnitude < 0x7c00u ? __builtin_bit_cast(uint32_t, finite) : (magnitude << 13) | 0x7f800000u;
  return __builtin_bit_cast(float, u | sign);
#endif
}

// Rounded to nearest, ties to even; a NaN stays one.
FASTRL_FN void store(float* p, float x) { *p = x; }
FASTRL_FN void store(double* p, double x) { *p = x; }
FASTRL_FN void store(BFloat16* p, float x) {
#if defined(FASTRL_ON_DEVICE)
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
#endif
}
FASTRL_FN void store(Float16* p, float x) {
#if defined(FASTRL_ON_DEVICE)
  p->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t u = __builtin_bit_cast(uint32_t, x), magnitude = u & 0x7fffffffu;
  const float a = __builtin_bit_cast(float, magnitude);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, a + 0.5f) - 0x3f000000u;  // 2^-24 is the last bit of 0.5
  const uint32_t rounded = a < 0x1p-14f ? subnormal : (a < 65520.0f ? normal : 0x7c00u);
  p->bits = static_cast<uint16_t>((x != x ? 0x7e00u : rounded) | ((u >> 16) & 0x8000u));
#endif
}

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// From a raw product to its logit.
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
  FASTRL_METHOD A operator()(A product, int64_t column, A& slope) const {
    if (kBias) product += bias[column];
    if (!kCap) {
      slope = scale;
      return product * scale;
    }
    const A t = tanh_of(product * scale * inv_cap);
    slope = (A(1) - t * t) * scale * inv_temperature;
    return cap * t;
  }

  // The logit of a row's token; -1: another vocabulary shard has it. Any other id outside the row reads nothing and is loud.
  template <bool kCap, typename T>
  FASTRL_METHOD A of_token(const T* row, int64_t id, int64_t cols) const {
    if (id == -1) return -static_cast<A>(__builtin_inf());
    if (id < 0 || id >= cols) return static_cast<A>(__builtin_nan(""));
    A slope;
    const A product = load(row + id);
    return operator()<false, kCap>(bias ? product + bias[id] : product, id, slope);
  }
};

// The statistics of some columns of a row: their largest logit, and sums (in S) relative to it. Parts of a row merge in any
// order; a NaN, and a +inf as inf - inf, end up in `sum` and make the row's results NaN.
template <typename A, typename S>
struct Partial {
  A max = -static_cast<A>(__builtin_inf());
  S sum = 0;  // of e^(z - max)
  S dot = 0;  // of e^(z - max) (z - max)

  FASTRL_METHOD bool empty() const { return max == -static_cast<A>(__builtin_inf()); }  // or every logit is -inf

  // Makes the sums relative to a larger maximum. From -inf there is nothing to scale, and -inf - -inf would poison them.
  FASTRL_METHOD void raise(A to) {
    if (!(to > max)) return;
    if (!empty()) {
      const S shift = static_cast<S>(max) - static_cast<S>(to);
      const S rescale = exp_of_log(shift);
      dot = rescale * (dot + sum * shift);
      sum *= rescale;
    }
    max = to;
  }

  // Logits z[0, size), of which none is above `max`.
  FASTRL_METHOD void add(const A* z, int64_t size) {
    const A shift = empty() ? A(0) : max;
    for (int64_t strip = 0; strip < size; strip += kStrip) {
      const int64_t end = size - strip < kStrip ? size : strip + kStrip;
      A strip_sum = 0, strip_dot = 0;
      FASTRL_LOOP(reduction(+ : strip_sum, strip_dot))
      for (int64_t j = strip; j < end; ++j) {
        const A d = z[j] - shift;
        const A e = exp_of_log(d);
        strip_sum += e;
        strip_dot += e * at_least(d, A(-1e30));  // a logit of -inf adds 0, not 0 * -inf
      }
      sum += strip_sum;
      dot += strip_dot;
    }
  }

  FASTRL_METHOD void merge(Partial other) {
    raise(other.max);
    other.raise(max);
    sum += other.sum;
    dot += other.dot;
  }

  // Writes the statistics of a whole row, given the logit of its token (-inf: in another shard). A row without a finite
  // logit gets NaN through log_sum, as in log_softmax.
  FASTRL_METHOD void write(const StatsArgs& a, int64_t row, A token_logit) const {
    const A log_sum = static_cast<A>(log(sum));
    static_cast<A*>(a.row_max)[row] = max;
    static_cast<A*>(a.log_sum)[row] = log_sum;
    static_cast<A*>(a.logps)[row] = (token_logit - max) - log_sum;
    if (a.mean) static_cast<A*>(a.mean)[row] = static_cast<A>(dot / sum);
  }
};

// d loss / d product of one row: [g_logp (onehot - p) - g_H p (log p + H) + g_lse p] * slope, log p + H = z - max - mean.
template <typename A>
struct RowGradient {
  A row_max, log_sum, mean, g_logp, g_entropy, g_prob;
  int64_t id;

  FASTRL_METHOD RowGradient(const GradArgs& a, int64_t row)
      : row_max(static_cast<const A*>(a.row_max)[row]),
        log_sum(static_cast<const A*>(a.log_sum)[row]),
        mean(a.grad_entropy ? static_cast<const A*>(a.mean)[row] : A(0)),
        g_logp(a.grad_logps ? static_cast<const A*>(a.grad_logps)[row] : A(0)),
        g_entropy(a.grad_entropy ? static_cast<const A*>(a.grad_entropy)[row] : A(0)),
        g_prob((a.grad_lse ? static_cast<const A*>(a.grad_lse)[row] : A(0)) - g_logp),
        id(a.ids[row]) {}

  // All but the one-hot term, which belongs to one column of the row: g_logp * slope.
  template <bool kEntropy>
  FASTRL_METHOD A operator()(A z, A slope) const {
    const A shifted = z - row_max;
    A g = g_prob;
    if (kEntropy) g -= g_entropy * (at_least(shifted, A(-1e30)) - mean);
    return exp_of_log(shifted - log_sum) * g * slope;
  }
};

}  // namespace
}  // namespace fastrl
