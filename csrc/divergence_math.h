// The arithmetic of a divergence between the student p and the teacher q, column by column, from their log-probabilities.
// A column of probability 0 adds exactly 0, not 0 * inf; a NaN stays.
#pragma once

#include "divergence.h"
#include "row_math.h"

namespace fastrl {
namespace {

template <typename A, Divergence kKind>
struct DivergenceTerms {
  A beta, rest;  // weights of the teacher and of the student in the mixture m
  explicit DivergenceTerms(double b) : beta(static_cast<A>(b)), rest(static_cast<A>(1.0 - b)) {}

  // x * y, but 0 where the probability x is 0, whatever y is.
  static FASTRL_METHOD A times(A x, A y) { return x == A(0) ? A(0) : x * y; }

  // ln(p / m) and ln(q / m), m = rest * p + beta * q: with d = ln(q / p), -ln(rest + beta e^d) and d more. The larger of p
  // and q is divided out, so that nothing overflows.
  FASTRL_METHOD void against_mixture(A lp, A lq, A& lpm, A& lqm) const {
    const A d = lq - lp;
    const bool above = d > A(0);
    const A e = exp_of_log(above ? -d : d);
    const A t = log_of(above ? mul_add(rest, e, beta) : mul_add(beta, e, rest));
    lpm = above ? -d - t : -t;
    lqm = above ? -t : d - t;
  }

  // A column's share of the divergence, and of the sum by which the gradient is centred.
  FASTRL_METHOD void operator()(A lp, A lq, A& share, A& centre) const {
    if (kKind == Divergence::kForwardKl) {
      share = times(exp_of_log(lq), lq - lp);
      centre = A(0);
    } else if (kKind == Divergence::kReverseKl) {
      share = centre = times(exp_of_log(lp), lp - lq);
    } else {
      A lpm, lqm;
      against_mixture(lp, lq, lpm, lqm);
      centre = times(exp_of_log(lp), lpm);
      share = beta * times(exp_of_log(lq), lqm) + rest * centre;
    }
  }

  // d divergence / d logit: p - q, or p (ln(p / q) - KL(p || q)), or (1 - beta) p (ln(p / m) - KL(p || m)).
  FASTRL_METHOD A gradient(A lp, A lq, A centre) const {
    const A p = exp_of_log(lp);
    if (kKind == Divergence::kForwardKl) return p - exp_of_log(lq);
    if (kKind == Divergence::kReverseKl) return times(p, lp - lq - centre);
    A lpm, lqm;
    against_mixture(lp, lq, lpm, lqm);
    return rest * times(p, lpm - centre);
  }
};

}  // namespace
}  // namespace fastrl
