// The policy terms of fastrl/objectives/surrogates.py that need no other token (or only the mean of their row's log-ratios),
// their gradients and the sums behind their metrics, in one pass. Ties, infinities and NaN come out as autograd leaves them.
// Compiled once per instruction set, as cpu/rows.cpp is, and with inlined code only for the same reason.
#include "surrogate_terms.h"

#include "policy_terms.h"
#include "strips.h"

namespace fastrl {
namespace {

// An infinite x counts as the largest finite number, so that a factor of 0 makes it 0.
template <typename A>
__attribute__((always_inline)) inline A times(A factor, A x) {
  const A most = sizeof(A) == 8 ? A(__DBL_MAX__) : A(__FLT_MAX__);
  return factor * (x < -most ? -most : (x > most ? most : x));
}

template <typename A>
A mean_log_ratio(const SurrogateTermsArgs& a, int64_t row) {
  const A* logps = static_cast<const A*>(a.logps) + row * a.cols;
  const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + row * a.cols : logps;
  const uint8_t* keep = a.scored + row * a.cols;
  double total = 0, count = 0;
  for (int64_t start = 0; start < a.cols; start += kStrip) {
    const int64_t end = a.cols - start < kStrip ? a.cols : start + kStrip;
    A sum = 0, kept = 0;
#pragma omp simd reduction(+ : sum, kept)
    for (int64_t j = start; j < end; ++j) {
      sum += keep[j] ? logps[j] - old[j] : A(0);
      kept += keep[j] ? A(1) : A(0);
    }
    total += sum;
    count += kept;
  }
  return static_cast<A>(total / (count > 1 ? count : 1));
}

template <typename A, Surrogate kSurrogate>
void surrogate_rows(const SurrogateTermsArgs& a, int64_t begin, int64_t end) {
  const A low = static_cast<A>(a.low), high = static_cast<A>(a.high), cap = static_cast<A>(a.cap);
  const A log_low = static_cast<A>(a.log_low), log_high = static_cast<A>(a.log_high), coef = static_cast<A>(a.coef);
  const A tau_pos = static_cast<A>(a.tau_pos), tau_neg = static_cast<A>(a.tau_neg);
  const A endless = static_cast<A>(__builtin_inf());
  const bool unbounded = log_low == -endless && log_high == endless;
  constexpr bool kByRatio = kSurrogate == Surrogate::kClipped || kSurrogate == Surrogate::kSoft;
  A entropy_buffer[kStrip], advantage_buffer[kStrip], gate_buffer[kStrip], grad_scratch[kStrip], log_ratios[kStrip];
  A ratios[kStrip], slopes[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    double* sums = a.sums + row * kSurrogateSums;
    for (int64_t k = 0; k < kSurrogateSums; ++k) sums[k] = 0;
    const A mean = a.row_mean ? mean_log_ratio<A>(a, row) : A(0);
    for (int64_t start = 0; start < a.cols; start += kStrip) {
      const int64_t size = a.cols - start < kStrip ? a.cols - start : kStrip, offset = row * a.cols + start;
      const A* logps = static_cast<const A*>(a.logps) + offset;
      const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + offset : logps;
      const A* weight = static_cast<const A*>(a.token_weight) + offset;
      const A* advantages = strip_of(a.advantages, a.row_advantages, A(0), row, a.cols, start, advantage_buffer);
      const A* gate = strip_of(a.gate, a.row_gate, A(1), row, a.cols, start, gate_buffer);
      const A* entropy = strip_of(a.entropy, false, A(0), row, a.cols, start, entropy_buffer);
      const uint8_t *keep = a.scored + offset, *counted = a.mask + offset, *alive = a.live + offset;
      A* grad = output_of(a.grad_logps, offset, grad_scratch);
      A policy = 0, entropy_sum = 0, log_ratio = 0, drift = 0;
      A scored = 0, counts = 0, lives = 0, lows = 0, highs = 0, outsides = 0, caps = 0;
      if (a.row_mean) {  // with the gradient of the token's own log-ratio, where that is finite
        const A bounded = mean < log_low ? log_low : (mean > log_high ? log_high : mean), c = exp_to_inf(bounded);
        const A slope = mean >= log_low && mean <= log_high ? c : A(0);
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) {
          log_ratios[j] = mean;
          ratios[j] = c;
          slopes[j] = logps[j] > -endless ? slope : A(0);
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) {
          const A d = logps[j] - old[j];
          log_ratios[j] = d < log_low ? log_low : (d > log_high ? log_high : d);
          ratios[j] = exp_to_inf(log_ratios[j]);
          slopes[j] = d >= log_low ? (d <= log_high ? ratios[j] : A(0)) : A(0);  // 0 for NaN: a bound stops it
        }
        if (unbounded) {
          for (int64_t j = 0; j < size; ++j) slopes[j] = ratios[j];
        }
      }
      // kSurrogate is a constant of the loop: the branches on it are gone from the compiled code.
#pragma omp simd reduction(+ : policy, entropy_sum, log_ratio, drift, scored, counts, lives, lows, highs, outsides, caps)
      for (int64_t j = 0; j < size; ++j) {
        const bool in = keep[j] != 0;
        const A l = logps[j], o = old[j], advantage = advantages[j], c = ratios[j], d = l - o;
        const bool up = advantage > A(0), down = advantage < A(0), fall = !up;
        const A within = c < low ? low : (c > high ? high : c);
        const bool finite = (l > -endless) & (l < endless);
        A loss, by_ratio = 0, by_logp = 0;  // the gradients through the ratio and through logps themselves
        bool is_low = (c < low) & down, is_high = (c > high) & up, outside = (c < low) | (c > high);
        bool capped = (c > cap) & down;
        if (kSurrogate == Surrogate::kClipped) {
          const A first = c * advantage, second = within * advantage;
          const A least = (first < second) | (first != first) ? first : second, most = -cap * advantage;
          // As autograd has it: a tie of a minimum is shared, and a bound itself is not clipped.
          const A share1 = first == second ? A(0.5) : (first > second ? A(0) : A(1));
          const A share2 = first == second ? A(0.5) : (first < second ? A(0) : A(1));
          const A slope = share1 * advantage + ((c >= low) & (c <= high) ? share2 * advantage : A(0));
          const bool bound = down & (cap < endless);
          const A share = !bound ? A(1) : (-least == most ? A(0.5) : (-least < most ? A(1) : A(0)));
          loss = bound & (-least > most) ? most : -least;
          by_ratio = -slope * share;
        } else if (kSurrogate == Surrogate::kTruncated) {
          const A factor = -within * advantage;
          loss = times(factor, l);
          by_logp = finite ? factor : A(0);
        } else if (kSurrogate == Surrogate::kLikelihood) {
          loss = times(-advantage, l);
          by_logp = finite ? -advantage : A(0);
        } else if (kSurrogate == Surrogate::kSoft) {
          const A tau = up ? tau_pos : tau_neg;
          const A share = A(1) / (A(1) + exp_to_inf(-tau * (c - A(1))));
          loss = -(A(4) / tau) * share * advantage;
          by_ratio = -A(4) * share * (A(1) - share) * advantage;
        } else if (kSurrogate == Surrogate::kQuadratic) {
          const A half = A(0.5) * coef, inner = half * d - advantage;
          loss = d * inner - times(advantage, o);
          by_logp = inner + d * half;
        } else {
          const A p = exp_of(l), q = exp_of(o);
          bool allowed;
          if (kSurrogate == Surrogate::kVariation) {
            allowed = (up & (p - q <= high)) | (fall & (p - q >= -low));
          } else {
            const A rest = (A(1) - q) * log_of((A(1) - q + A(1e-8)) / (A(1) - p + A(1e-8)));
            const A kl = times(q, o - l) + rest;
            allowed = (up & ((kl <= high) | (p <= q))) | (fall & ((kl <= low) | (p >= q)));
          }
          const A factor = allowed ? -(c > cap ? cap : c) * advantage : A(0);
          loss = times(factor, l);
          by_logp = finite ? factor : A(0);
          is_low = !allowed && fall;
          is_high = !allowed && up;
          outside = !allowed;
          capped = (c > cap) & allowed;
        }
        const A through = kByRatio && slopes[j] != A(0) ? by_ratio * gate[j] * slopes[j] : A(0);
        policy += in ? loss * gate[j] * weight[j] : A(0);
        grad[j] = in ? weight[j] * (through + by_logp * gate[j]) : A(0);
        entropy_sum += in ? entropy[j] : A(0);
        log_ratio += in ? log_ratios[j] : A(0);
        drift += in ? d : A(0);
        scored += in ? A(1) : A(0);
        counts += counted[j] ? A(1) : A(0);
        lives += alive[j] ? A(1) : A(0);
        lows += in & is_low ? A(1) : A(0);
        highs += in & is_high ? A(1) : A(0);
        outsides += in & outside ? A(1) : A(0);
        caps += in & capped ? A(1) : A(0);
      }
      sums[kPolicy] += policy;
      sums[kEntropy] += entropy_sum;
      sums[kScored] += scored;
      sums[kCounted] += counts;
      sums[kLive] += lives;
      sums[kLow] += lows;
      sums[kHigh] += highs;
      sums[kOutside] += outsides;
      sums[kCapped] += caps;
      sums[kLogRatio] += log_ratio;
      sums[kDrift] += drift;
    }
  }
}

template <typename A>
void surrogate_rows(const SurrogateTermsArgs& a, int64_t begin, int64_t end) {
  switch (a.surrogate) {
    case Surrogate::kClipped: return surrogate_rows<A, Surrogate::kClipped>(a, begin, end);
    case Surrogate::kTruncated: return surrogate_rows<A, Surrogate::kTruncated>(a, begin, end);
    case Surrogate::kLikelihood: return surrogate_rows<A, Surrogate::kLikelihood>(a, begin, end);
    case Surrogate::kSoft: return surrogate_rows<A, Surrogate::kSoft>(a, begin, end);
    case Surrogate::kQuadratic: return surrogate_rows<A, Surrogate::kQuadratic>(a, begin, end);
    case Surrogate::kVariation: return surrogate_rows<A, Surrogate::kVariation>(a, begin, end);
    case Surrogate::kDivergence: return surrogate_rows<A, Surrogate::kDivergence>(a, begin, end);
  }
}

}  // namespace

#define FASTRL_JOIN2(a, b) a##b
#define FASTRL_JOIN(a, b) FASTRL_JOIN2(a, b)

void FASTRL_JOIN(surrogate_terms_, FASTRL_ISA)(const SurrogateTermsArgs& a, int64_t begin, int64_t end) {
  a.fp64 ? surrogate_rows<double>(a, begin, end) : surrogate_rows<float>(a, begin, end);
}

}  // namespace fastrl
