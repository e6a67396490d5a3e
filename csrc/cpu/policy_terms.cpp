// PolicyObjective.token_loss, its gradient and its metrics in one pass over the tokens of a row (a sequence-level ratio takes
// three: mean log-ratio, terms, gradient). Ties at a clip bound, infinities and NaN come out as autograd leaves them.
// Compiled once per instruction set, as cpu/rows.cpp is, and with inlined code only for the same reason.
#include "policy_terms.h"

#include "strips.h"

namespace fastrl {
namespace {

template <typename A, KlEstimator kEstimator, bool kSequence>
void policy_rows(const PolicyTermsArgs& a, int64_t begin, int64_t end) {
  const A low = static_cast<A>(a.low), high = static_cast<A>(a.high), delta = static_cast<A>(a.delta);
  const A beta = static_cast<A>(a.beta), endless = static_cast<A>(__builtin_inf());
  const bool kl_by_ratio = a.kl_times_ratio;
  uint8_t ones[kStrip];
  for (auto& one : ones) one = 1;
  A ratio[kStrip], entropy_buffer[kStrip], advantage_buffer[kStrip], gate_buffer[kStrip], bonus_buffer[kStrip];
  A terms_scratch[kStrip], grad_scratch[kStrip], grad_entropy_scratch[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    double sums[kTermSums] = {};
    A row_ratio = 1;
    double count = 1, row_slope = 0;  // the gradient that reaches the row's one ratio
    if (kSequence) {
      double log_ratio = 0, scored = 0;
      for (int64_t start = 0; start < a.cols; start += kStrip) {
        const int64_t size = a.cols - start < kStrip ? a.cols - start : kStrip, offset = row * a.cols + start;
        const A* logps = static_cast<const A*>(a.logps) + offset;
        const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + offset : logps;
        const uint8_t* keep = a.scored ? a.scored + offset : ones;
        A sum = 0, kept = 0;
#pragma omp simd reduction(+ : sum, kept)
        for (int64_t j = 0; j < size; ++j) {
          sum += keep[j] ? logps[j] - old[j] : A(0);
          kept += keep[j] ? A(1) : A(0);
        }
        log_ratio += sum;
        scored += kept;
      }
      count = scored > 1 ? scored : 1;
      row_ratio = exp_to_inf(static_cast<A>(log_ratio / count));
    }
    for (int64_t start = 0; start < a.cols; start += kStrip) {
      const int64_t size = a.cols - start < kStrip ? a.cols - start : kStrip, offset = row * a.cols + start;
      const A* logps = static_cast<const A*>(a.logps) + offset;
      const A* old = a.old_logps ? static_cast<const A*>(a.old_logps) + offset : logps;
      const A* ref = kEstimator == KlEstimator::kNone ? logps : static_cast<const A*>(a.ref_logps) + offset;
      const A* weight = static_cast<const A*>(a.token_weight) + offset;
      const A* advantages = strip_of(a.advantages, a.row_advantages, A(0), row, a.cols, start, advantage_buffer);
      const A* gate = strip_of(a.gate, a.row_gate, A(1), row, a.cols, start, gate_buffer);
      const A* entropy = strip_of(a.entropy, false, A(0), row, a.cols, start, entropy_buffer);
      const A* bonus_weight = strip_of(a.entropy_weight, false, A(0), row, a.cols, start, bonus_buffer);
      const uint8_t* keep = a.scored ? a.scored + offset : ones;
      A* terms = output_of(a.terms, offset, terms_scratch);
      A* grad = output_of(a.grad_logps, offset, grad_scratch);
      A* grad_entropy = output_of(a.grad_entropy, offset, grad_entropy_scratch);
      if (kSequence) {
        for (int64_t j = 0; j < size; ++j) ratio[j] = row_ratio;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) ratio[j] = exp_to_inf(logps[j] - old[j]);
      }
      A policy = 0, bonus = 0, kl_sum = 0, entropy_sum = 0, scored = 0, clipped_low = 0, clipped_high = 0, slopes = 0;
#pragma omp simd reduction(+ : policy, bonus, kl_sum, entropy_sum, scored, clipped_low, clipped_high, slopes)
      for (int64_t j = 0; j < size; ++j) {
        const bool in = keep[j] != 0;
        const A c = ratio[j], advantage = advantages[j], w = weight[j];
        const A bounded = c > delta ? delta : c;
        const A clipped = c < low ? low : (c > high ? high : c);
        const A first = bounded * advantage, second = clipped * advantage;
        const A least = (first < second) | (first != first) ? first : second;
        // d least / d c as autograd has it: a tie of the minimum is shared, and a bound itself is not clipped.
        const A share1 = first == second ? A(0.5) : (first > second ? A(0) : A(1));
        const A share2 = first == second ? A(0.5) : (first < second ? A(0) : A(1));
        const A slope = (c <= delta ? share1 * advantage : A(0)) + ((c >= low) & (c <= high) ? share2 * advantage : A(0));
        A loss = -least * gate[j], grad_ratio = -slope * gate[j], grad_own = 0;
        if (kEstimator != KlEstimator::kNone) {
          const bool nowhere = (ref[j] == -endless) & (logps[j] == -endless);  // neither policy can take this token
          const A d = nowhere ? A(0) : ref[j] - logps[j];
          const A factor = kl_by_ratio ? c : A(1);
          A kl, slope_kl;
          if (kEstimator == KlEstimator::kK1) {
            kl = -d;
            slope_kl = factor;
          } else if (kEstimator == KlEstimator::kK2) {
            kl = A(0.5) * d * d;
            slope_kl = (d == endless) | (d == -endless) ? A(0) : -d * factor;
          } else {
            const A e = exp_to_inf(d);
            kl = d == endless ? endless : e - d - 1;
            // not factor * (1 - e): an infinite ratio leaves NaN, as in autograd
            slope_kl = d == endless ? A(0) : factor - factor * e;
          }
          slope_kl = nowhere ? A(0) : slope_kl;
          grad_ratio += kl_by_ratio ? beta * kl : A(0);  // selected, since 0 * inf is NaN
          grad_own = beta * slope_kl;
          kl = kl_by_ratio ? kl * c : kl;
          loss += beta * kl;
          kl_sum += in ? kl : A(0);
        }
        const A term = in ? loss * w : A(0), extra = in ? bonus_weight[j] * entropy[j] : A(0);
        policy += term;
        bonus += extra;
        terms[j] = term - extra;
        grad[j] = in ? w * (kSequence ? grad_own : grad_ratio * c + grad_own) : A(0);
        grad_entropy[j] = in ? -bonus_weight[j] : A(0);
        slopes += in ? w * grad_ratio : A(0);
        entropy_sum += in ? entropy[j] : A(0);
        scored += in ? A(1) : A(0);
        clipped_low += in & (bounded < low) & (advantage < 0) ? A(1) : A(0);
        clipped_high += in & (bounded > high) & (advantage > 0) ? A(1) : A(0);
      }
      row_slope += slopes;
      sums[kPolicy] += policy;
      sums[kBonus] += bonus;
      sums[kKl] += kl_sum;
      sums[kEntropy] += entropy_sum;
      sums[kScored] += scored;
      sums[kLow] += clipped_low;
      sums[kHigh] += clipped_high;
      if (a.sums) {
        const uint8_t* counted = a.mask ? a.mask + offset : keep;
        const uint8_t* live = a.live ? a.live + offset : keep;
        int32_t counts = 0, lives = 0;
#pragma omp simd reduction(+ : counts, lives)
        for (int64_t j = 0; j < size; ++j) {
          counts += counted[j];
          lives += live[j];
        }
        sums[kCounted] += counts;
        sums[kLive] += lives;
      }
    }
    if (kSequence && a.grad_logps) {
      const A share = static_cast<A>(row_slope * row_ratio / count);
      A* grad = static_cast<A*>(a.grad_logps) + row * a.cols;
      const uint8_t* keep = a.scored ? a.scored + row * a.cols : nullptr;
      for (int64_t j = 0; j < a.cols; ++j) grad[j] += !keep || keep[j] ? share : A(0);
    }
    if (kSequence && a.row_advantages) {  // one ratio and one advantage: the sequence is clipped, not its tokens
      const A bounded = row_ratio > delta ? delta : row_ratio, advantage = static_cast<const A*>(a.advantages)[row];
      sums[kLow] = (bounded < low) & (advantage < 0) ? 1 : 0;
      sums[kHigh] = (bounded > high) & (advantage > 0) ? 1 : 0;
    }
    if (a.sums) {
      for (int64_t k = 0; k < kTermSums; ++k) a.sums[row * kTermSums + k] = sums[k];
    }
  }
}

template <typename A, bool kSequence>
void policy_rows(const PolicyTermsArgs& a, int64_t begin, int64_t end) {
  switch (a.kl) {
    case KlEstimator::kNone: return policy_rows<A, KlEstimator::kNone, kSequence>(a, begin, end);
    case KlEstimator::kK1: return policy_rows<A, KlEstimator::kK1, kSequence>(a, begin, end);
    case KlEstimator::kK2: return policy_rows<A, KlEstimator::kK2, kSequence>(a, begin, end);
    case KlEstimator::kK3: return policy_rows<A, KlEstimator::kK3, kSequence>(a, begin, end);
  }
}

template <typename A>
void policy_rows(const PolicyTermsArgs& a, int64_t begin, int64_t end) {
  a.sequence ? policy_rows<A, true>(a, begin, end) : policy_rows<A, false>(a, begin, end);
}

}  // namespace

#define FASTRL_JOIN2(a, b) a##b
#define FASTRL_JOIN(a, b) FASTRL_JOIN2(a, b)

void FASTRL_JOIN(policy_terms_, FASTRL_ISA)(const PolicyTermsArgs& a, int64_t begin, int64_t end) {
  a.fp64 ? policy_rows<double>(a, begin, end) : policy_rows<float>(a, begin, end);
}

}  // namespace fastrl
