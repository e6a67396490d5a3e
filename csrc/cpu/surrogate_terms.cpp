// The policy terms of fastrl/objectives/surrogates.py that need no other token, or only sums over their row, their gradients
// and the sums behind their metrics, in one pass (with sums over the row two or three). Ties, infinities and NaN come out as
// autograd leaves them.
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

// Tokens scored in a row, and the sum of their log-ratios, each within +-bound.
template <typename A>
void row_log_ratio(const SurrogateTermsArgs& a, int64_t row, A bound, double& total, double& count) {
  const A* logps = static_cast<const A*>(a.logps) + row * a.cols;
  const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + row * a.cols : logps;
  const uint8_t* keep = a.scored + row * a.cols;
  total = count = 0;
  for (int64_t start = 0; start < a.cols; start += kStrip) {
    const int64_t end = a.cols - start < kStrip ? a.cols : start + kStrip;
    A sum = 0;
    int32_t kept = 0;
#pragma omp simd reduction(+ : sum, kept)
    for (int64_t j = start; j < end; ++j) {
      const A d = logps[j] - old[j];
      sum += keep[j] ? (d < -bound ? -bound : (d > bound ? bound : d)) : A(0);
      kept += keep[j];
    }
    total += sum;
    count += kept;
  }
}

// VESPO's log-weight u of a row: its log-ratios, and the logs of further importance ratios.
template <typename A>
A gamma_log_ratio(const SurrogateTermsArgs& a, int64_t row) {
  const double floor = __builtin_log(1e-8), most = 20;
  const auto within = [&](double x) { return x < floor ? floor : (x > most ? most : x); };
  const A* mismatch = static_cast<const A*>(a.mismatch);
  double u, count;
  row_log_ratio<A>(a, row, A(20), u, count);
  if (mismatch && a.row_mismatch) u += within(__builtin_log(static_cast<double>(mismatch[row])));
  for (int64_t j = row * a.cols; mismatch && !a.row_mismatch && j < (row + 1) * a.cols; ++j) {
    if (a.reads_padding || a.scored[j]) u += within(__builtin_log(static_cast<double>(mismatch[j])));
  }
  return static_cast<A>(within(u));
}

// What every policy term counts of a strip, and the logps that are given back.
template <typename A>
__attribute__((always_inline)) inline void count_strip(const SurrogateTermsArgs& a, int64_t offset, int64_t size,
                                                       const A* advantages, const A* gate, double* sums) {
  const A* logps = static_cast<const A*>(a.logps) + offset;
  A* scored_logps = static_cast<A*>(a.scored_logps) + offset;
  const uint8_t *keep = a.scored + offset, *counted = a.mask + offset, *alive = (a.live ? a.live : a.mask) + offset;
  const bool moved = !a.live && a.moved;
  int32_t scored = 0, counts = 0, lives = 0;
#pragma omp simd reduction(+ : scored, counts, lives)
  for (int64_t j = 0; j < size; ++j) {
    scored_logps[j] = keep[j] ? logps[j] : A(0);
    scored += keep[j];
    counts += counted[j];
    lives += alive[j] & (!moved | ((advantages[j] != A(0)) & (gate[j] != A(0))));
  }
  sums[kScored] += scored;
  sums[kCounted] += counts;
  sums[kLive] += lives;
  if (!a.entropy) return;
  const A* entropy = static_cast<const A*>(a.entropy) + offset;
  A entropy_sum = 0;
#pragma omp simd reduction(+ : entropy_sum)
  for (int64_t j = 0; j < size; ++j) entropy_sum += keep[j] ? entropy[j] : A(0);
  sums[kEntropy] += entropy_sum;
}

template <typename A, Surrogate kSurrogate>
void surrogate_rows(const SurrogateTermsArgs& a, int64_t begin, int64_t end) {
  const A low = static_cast<A>(a.low), high = static_cast<A>(a.high), cap = static_cast<A>(a.cap);
  const A log_low = static_cast<A>(a.log_low), log_high = static_cast<A>(a.log_high), coef = static_cast<A>(a.coef);
  const A tau_pos = static_cast<A>(a.tau_pos), tau_neg = static_cast<A>(a.tau_neg);
  const A endless = static_cast<A>(__builtin_inf());
  const bool unbounded = log_low == -endless && log_high == endless;
  constexpr bool kSelects = kSurrogate == Surrogate::kClipped || kSurrogate == Surrogate::kPenalised;
  constexpr bool kByRatio = kSelects || kSurrogate == Surrogate::kSoft;
  constexpr bool kByStep = kSurrogate == Surrogate::kVariation || kSurrogate == Surrogate::kDivergence;
  constexpr bool kRatio = kByRatio || kByStep || kSurrogate == Surrogate::kTruncated;  // others need no exp
  A advantage_buffer[kStrip], gate_buffer[kStrip], grad_scratch[kStrip], log_ratios[kStrip], ratios[kStrip], slopes[kStrip];
  uint8_t none[kStrip] = {};
  for (int64_t row = begin; row < end; ++row) {
    double* sums = a.sums + row * kSurrogateSums;
    for (int64_t k = 0; k < kSurrogateSums; ++k) sums[k] = 0;
    const A weight = static_cast<const A*>(a.row_weight)[row];
    double total = 0, count = 0, row_slope = 0;  // row_slope: the gradient that reaches the row's one ratio
    if (a.level != Level::kToken) row_log_ratio<A>(a, row, endless, total, count);
    const A d_row = static_cast<A>(a.level == Level::kRowMean ? total / (count > 1 ? count : 1) : total);
    const A bounded = d_row < log_low ? log_low : (d_row > log_high ? log_high : d_row), c_row = exp_to_inf(bounded);
    A phi_pos = 0, phi_neg = 0;
    if (kSurrogate == Surrogate::kGamma) {
      const A u = gamma_log_ratio<A>(a, row), e = exp_to_inf(u);
      const auto phi = [&](double k, double lambda) {
        const A l = static_cast<A>(lambda < 1e-4 ? 1e-4 : lambda);
        return exp_to_inf(l + static_cast<A>(k) * u - l * e);
      };
      phi_pos = phi(a.k_pos, a.lambda_pos);
      phi_neg = phi(a.k_neg, a.lambda_neg);
    }
    for (int64_t start = 0; start < a.cols; start += kStrip) {
      const int64_t size = a.cols - start < kStrip ? a.cols - start : kStrip, offset = row * a.cols + start;
      const A* logps = static_cast<const A*>(a.logps) + offset;
      const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + offset : logps;
      const A* advantages = strip_of(a.advantages, a.row_advantages, A(0), row, a.cols, start, advantage_buffer);
      const A* gate = strip_of(a.gate, a.row_gate, A(1), row, a.cols, start, gate_buffer);
      const uint8_t* keep = a.scored + offset;
      const uint8_t* selected = kSelects && a.selected ? a.selected + offset : none;
      A* grad = output_of(a.grad_logps, offset, grad_scratch);
      A policy = 0, log_ratio = 0, drift = 0, slope_sum = 0, phis = 0;
      int32_t lows = 0, highs = 0, outsides = 0, caps = 0, picks = 0;
      count_strip<A>(a, offset, size, advantages, gate, sums);
      if (a.level == Level::kToken) {
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) {
          const A d = logps[j] - old[j];
          log_ratios[j] = d < log_low ? log_low : (d > log_high ? log_high : d);
          if (kRatio) ratios[j] = exp_to_inf(log_ratios[j]);
          if (kByRatio) slopes[j] = d >= log_low ? (d <= log_high ? ratios[j] : A(0)) : A(0);  // 0 for NaN: a bound stops it
        }
        if (kByRatio && unbounded) {
          for (int64_t j = 0; j < size; ++j) slopes[j] = ratios[j];
        }
      } else {
        const bool own = a.level == Level::kRowMean && d_row >= log_low && d_row <= log_high;
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) {
          log_ratios[j] = bounded;
          ratios[j] = c_row;
          slopes[j] = own && logps[j] > -endless ? c_row : A(0);  // the token's own, where its logp is finite
        }
      }
      // kSurrogate is a constant of the loop: the branches on it are gone from the compiled code.
#pragma omp simd reduction(+ : policy, log_ratio, drift, slope_sum, phis, lows, highs, outsides, caps, picks)
      for (int64_t j = 0; j < size; ++j) {
        const bool in = keep[j] != 0;
        const A l = logps[j], o = old[j], advantage = advantages[j], c = kRatio ? ratios[j] : A(1), d = l - o;
        const bool up = advantage > A(0), down = advantage < A(0), fall = !up;
        const A within = c < low ? low : (c > high ? high : c);
        const bool finite = (l > -endless) & (l < endless);
        A loss, by_ratio = 0, by_logp = 0;  // the gradients through the ratio and through logps themselves
        bool is_low = (c < low) & down, is_high = (c > high) & up, outside = (c < low) | (c > high);
        bool capped = (c > cap) & down;
        if (kSurrogate == Surrogate::kClipped) {
          const bool cut = selected[j] != 0;
          const A first = c * advantage, second = within * advantage;
          const A least = (first < second) | (first != first) ? first : second, most = -cap * advantage;
          // As autograd has it: a tie of a minimum is shared, and a bound itself is not clipped.
          const A share1 = first == second ? A(0.5) : (first > second ? A(0) : A(1));
          const A share2 = first == second ? A(0.5) : (first < second ? A(0) : A(1));
          const A slope = share1 * advantage + ((c >= low) & (c <= high) ? share2 * advantage : A(0));
          const bool bound = down & (cap < endless);
          const A share = !bound ? A(1) : (-least == most ? A(0.5) : (-least < most ? A(1) : A(0)));
          loss = cut ? A(0) : (bound & (-least > most) ? most : -least);
          by_ratio = cut ? A(0) : -slope * share;
        } else if (kSurrogate == Surrogate::kPenalised) {
          const bool far = selected[j] != 0;
          loss = -c * advantage + (far ? coef * (d < A(0) ? -d : d) : A(0));
          by_ratio = -advantage;
          by_logp = far ? (d < A(0) ? -coef : (d > A(0) ? coef : A(0))) : A(0);
        } else if (kSurrogate == Surrogate::kTruncated) {
          const A factor = -within * advantage;
          loss = times(factor, l);
          by_logp = finite ? factor : A(0);
        } else if (kSurrogate == Surrogate::kLikelihood) {
          loss = times(-advantage, l);
          by_logp = finite ? -advantage : A(0);
        } else if (kSurrogate == Surrogate::kGamma) {
          const A phi = down ? phi_neg : phi_pos, factor = -phi * advantage;
          loss = times(factor, l);
          by_logp = finite ? factor : A(0);
          phis += in ? phi : A(0);
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
          is_low = !allowed & fall;
          is_high = !allowed & up;
          outside = !allowed;
          capped = (c > cap) & allowed;
        }
        const A through = kByRatio && slopes[j] != A(0) ? by_ratio * gate[j] * slopes[j] : A(0);
        policy += in ? loss * gate[j] * weight : A(0);
        grad[j] = in ? weight * (through + by_logp * gate[j]) : A(0);
        log_ratio += in ? (kSurrogate == Surrogate::kPenalised && log_ratios[j] < A(0) ? -log_ratios[j] : log_ratios[j]) : A(0);
        drift += in ? d : A(0);
        if (kSurrogate == Surrogate::kClipped) slope_sum += in ? weight * by_ratio * gate[j] : A(0);
        if (kRatio) {
          lows += in & is_low;
          highs += in & is_high;
          outsides += in & outside;
          caps += in & capped;
        }
        if (kSelects) picks += in & (selected[j] != 0);
      }
      row_slope += slope_sum;
      sums[kPolicy] += policy;
      sums[kLow] += lows;
      sums[kHigh] += highs;
      sums[kOutside] += outsides;
      sums[kCapped] += caps;
      sums[kLogRatio] += log_ratio;
      sums[kDrift] += drift;
      sums[kSelected] += picks;
      sums[kPhi] += phis;
    }
    if (kSurrogate == Surrogate::kGamma && a.row_advantages) {  // one weight of the sequence
      sums[kPhi] = static_cast<const A*>(a.advantages)[row] < A(0) ? phi_neg : phi_pos;
    }
    if (a.level != Level::kRowSum) continue;
    const A share = static_cast<A>(row_slope * c_row);
    A* grad = static_cast<A*>(a.grad_logps) + row * a.cols;
    for (int64_t j = 0; a.grad_logps && j < a.cols; ++j) grad[j] = a.scored[row * a.cols + j] ? share : A(0);
    if (a.row_advantages) {  // one ratio and one advantage: the sequence is clipped, not its tokens
      const A advantage = static_cast<const A*>(a.advantages)[row];
      sums[kLow] = (c_row < low) & (advantage < 0) ? 1 : 0;
      sums[kHigh] = (c_row > high) & (advantage > 0) ? 1 : 0;
    }
  }
}

// The loss of a row from the geometric mean of its clipped ratios; a gate of 0 leaves a token out of that mean.
template <typename A>
void geometric_rows(const SurrogateTermsArgs& a, int64_t begin, int64_t end) {
  const A low = static_cast<A>(a.low), high = static_cast<A>(a.high);
  A advantage_buffer[kStrip], gate_buffer[kStrip], grad_scratch[kStrip];
  const auto length = [&](double count) { return (count > 1 ? count : 1) + a.length_eps; };
  for (int64_t row = begin; row < end; ++row) {
    double* sums = a.sums + row * kSurrogateSums;
    for (int64_t k = 0; k < kSurrogateSums; ++k) sums[k] = 0;
    double total = 0, chosen = 0, advantage_sum = 0, mismatch_sum = 0;
    for (int64_t start = 0; start < a.cols; start += kStrip) {
      const int64_t size = a.cols - start < kStrip ? a.cols - start : kStrip, offset = row * a.cols + start;
      const A* logps = static_cast<const A*>(a.logps) + offset;
      const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + offset : logps;
      const A* advantages = strip_of(a.advantages, a.row_advantages, A(0), row, a.cols, start, advantage_buffer);
      const A* gate = strip_of(a.gate, a.row_gate, A(1), row, a.cols, start, gate_buffer);
      const uint8_t* keep = a.scored + offset;
      A* grad = output_of(a.grad_logps, offset, grad_scratch);  // d mean / d logps, but for the mean's length
      A sum = 0, advantage_strip = 0, drift = 0;
      int32_t kept = 0, lows = 0, highs = 0, ups = 0, downs = 0;
      count_strip<A>(a, offset, size, advantages, gate, sums);
#pragma omp simd reduction(+ : sum, kept, advantage_strip, drift, lows, highs, ups, downs)
      for (int64_t j = 0; j < size; ++j) {
        const bool in = keep[j] != 0, counts = in & (gate[j] != A(0));
        const A d = logps[j] - old[j], advantage = advantages[j];
        const bool up = advantage > A(0), down = advantage < A(0), below = d < low, above = d > high;
        const bool cut = (up & above) | (down & below) | (advantage == A(0));
        const A bounded = advantage == A(0) ? A(0) : (cut ? (above ? high : low) : d);
        sum += counts ? bounded : A(0);
        kept += counts;
        advantage_strip += in ? advantage : A(0);
        grad[j] = counts & !cut ? A(1) : A(0);
        drift += in ? d : A(0);
        lows += in & below & down;
        highs += in & above & up;
        ups += in & (below | above) & up;
        downs += in & (below | above) & down;
      }
      total += sum;
      chosen += kept;
      advantage_sum += advantage_strip;
      sums[kLow] += lows;
      sums[kHigh] += highs;
      sums[kOutside] += ups;
      sums[kCapped] += downs;
      sums[kLogRatio] += drift;
      sums[kDrift] += drift;
    }
    A factor = exp_to_inf(static_cast<A>(total / length(chosen)));
    if (a.mismatch) {
      const A* mismatch = static_cast<const A*>(a.mismatch) + (a.row_mismatch ? row : row * a.cols);
      for (int64_t j = 0; j < a.cols; ++j) {
        if (a.scored[row * a.cols + j]) mismatch_sum += __builtin_log(mismatch[a.row_mismatch ? 0 : j] + 1e-10);
      }
      factor *= exp_to_inf(static_cast<A>(mismatch_sum / length(sums[kScored])));
    }
    const A loss = -static_cast<A>(advantage_sum / length(sums[kScored])) * factor;
    const A weight = static_cast<A>(static_cast<const A*>(a.row_weight)[row] * sums[kScored]);
    sums[kPolicy] = sums[kScored] > 0 ? loss * weight : A(0);
    const A slope = static_cast<A>(loss * weight / length(chosen));
    A* grad = static_cast<A*>(a.grad_logps) + row * a.cols;
    for (int64_t j = 0; a.grad_logps && j < a.cols; ++j) grad[j] = grad[j] != A(0) ? slope : A(0);
  }
}

template <typename A>
void covariance_sums(const CovarianceArgs& a, int64_t begin, int64_t end) {
  const A endless = static_cast<A>(__builtin_inf());
  A advantage_buffer[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    double advantage_sum = 0, logp_sum = 0, count = 0;
    for (int64_t start = 0; start < a.cols; start += kStrip) {
      const int64_t size = a.cols - start < kStrip ? a.cols - start : kStrip, offset = row * a.cols + start;
      const A* logps = static_cast<const A*>(a.logps) + offset;
      const A* advantages = strip_of(a.advantages, a.row_advantages, A(0), row, a.cols, start, advantage_buffer);
      const uint8_t* keep = a.scored + offset;
      A strip_advantage = 0, strip_logp = 0;
      int32_t strip_count = 0;
#pragma omp simd reduction(+ : strip_advantage, strip_logp, strip_count)
      for (int64_t j = 0; j < size; ++j) {
        const A l = logps[j], advantage = advantages[j];
        const bool known = (keep[j] != 0) & (l > -endless) & (l < endless) & (advantage > -endless) & (advantage < endless);
        strip_advantage += known ? advantage : A(0);
        strip_logp += known ? l : A(0);
        strip_count += known;
      }
      advantage_sum += strip_advantage;
      logp_sum += strip_logp;
      count += strip_count;
    }
    a.sums[3 * row] = advantage_sum;
    a.sums[3 * row + 1] = logp_sum;
    a.sums[3 * row + 2] = count;
  }
}

template <typename A>
void covariances(const CovarianceArgs& a, int64_t begin, int64_t end) {
  const A endless = static_cast<A>(__builtin_inf()), low = static_cast<A>(a.low), high = static_cast<A>(a.high);
  const A lower = static_cast<A>(a.lower), upper = static_cast<A>(a.upper);
  const A mean_advantage = static_cast<A>(a.mean_advantage), mean_logp = static_cast<A>(a.mean_logp);
  A advantage_buffer[kStrip], covariance_scratch[kStrip];
  uint8_t candidate_scratch[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    int64_t found = 0;
    for (int64_t start = 0; start < a.cols; start += kStrip) {
      const int64_t size = a.cols - start < kStrip ? a.cols - start : kStrip, offset = row * a.cols + start;
      const A* logps = static_cast<const A*>(a.logps) + offset;
      const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + offset : logps;
      const A* advantages = strip_of(a.advantages, a.row_advantages, A(0), row, a.cols, start, advantage_buffer);
      const uint8_t* keep = a.scored + offset;
      A* covariance = output_of(a.covariance, offset, covariance_scratch);
      uint8_t* candidates = a.candidates ? a.candidates + offset : candidate_scratch;
      int32_t strip_found = 0;
#pragma omp simd reduction(+ : strip_found)
      for (int64_t j = 0; j < size; ++j) {
        const A l = logps[j], advantage = advantages[j];
        const bool known = (keep[j] != 0) & (l > -endless) & (l < endless) & (advantage > -endless) & (advantage < endless);
        const A value = known ? (advantage - mean_advantage) * (l - mean_logp) : -endless;
        covariance[j] = value;
        const A c = exp_to_inf(l - old[j]);
        const bool clipped = ((c < low) & (advantage < A(0))) | ((c > high) & (advantage > A(0)));
        const bool candidate = (value > lower) & (value < upper) & !clipped;
        candidates[j] = candidate;
        strip_found += candidate;
      }
      found += strip_found;
    }
    a.sums[3 * row] = static_cast<double>(found);
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
    case Surrogate::kPenalised: return surrogate_rows<A, Surrogate::kPenalised>(a, begin, end);
    case Surrogate::kGamma: return surrogate_rows<A, Surrogate::kGamma>(a, begin, end);
    case Surrogate::kGeometric: return geometric_rows<A>(a, begin, end);
  }
}

}  // namespace

#define FASTRL_JOIN2(a, b) a##b
#define FASTRL_JOIN(a, b) FASTRL_JOIN2(a, b)

void FASTRL_JOIN(surrogate_terms_, FASTRL_ISA)(const SurrogateTermsArgs& a, int64_t begin, int64_t end) {
  a.fp64 ? surrogate_rows<double>(a, begin, end) : surrogate_rows<float>(a, begin, end);
}

void FASTRL_JOIN(covariance_sums_, FASTRL_ISA)(const CovarianceArgs& a, int64_t begin, int64_t end) {
  a.fp64 ? covariance_sums<double>(a, begin, end) : covariance_sums<float>(a, begin, end);
}

void FASTRL_JOIN(covariances_, FASTRL_ISA)(const CovarianceArgs& a, int64_t begin, int64_t end) {
  a.fp64 ? covariances<double>(a, begin, end) : covariances<float>(a, begin, end);
}

}  // namespace fastrl
