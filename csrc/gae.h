// Generalized advantage estimation (Schulman et al. 2016, eq. 16): the options and the recurrence, shared by the C++ and the
// CUDA kernels. From the last step of a row to the first, over the steps that count:
//   A_t = (r_t + gamma V_next - V_t) + gamma lambda A_next
#pragma once

#include "vector_math.h"

namespace fastrl {

// A is double if `fp64`, else float. Arrays are [rows, cols] of A and contiguous.
struct GaeArgs {
  bool fp64;
  const void *rewards, *values;
  const uint8_t* mask;  // [rows, cols], 0 or 1: where it is 0, nothing is read and the outputs are 0
  int64_t rows, cols;
  double gamma, lam;
  bool through_mask;  // masked steps count as reward 0 and value 0; else they are skipped
  void *advantages, *returns;
};

namespace {

// What the recurrence carries from the right.
template <typename A>
struct GaeState {
  A advantage = 0, next_value = 0;

  FASTRL_METHOD void step(A reward, A value, A gamma, A decay) {
    advantage = mul_add(decay, advantage, mul_add(gamma, next_value, reward) - value);
    next_value = value;
  }
};

// What some consecutive steps do to the state, an affine map, so that a scan can do them in parallel:
//   advantage' = a advantage + b next_value + c,  next_value' = w next_value + v
template <typename A>
struct GaeMap {
  A a = 1, b = 0, c = 0, w = 1, v = 0;

  FASTRL_METHOD static GaeMap of_step(A reward, A value, A gamma, A decay) {
    GaeMap map;
    map.a = decay, map.b = gamma, map.c = reward - value, map.w = 0, map.v = value;
    return map;
  }
  FASTRL_METHOD GaeMap after(const GaeMap& right) const {  // the steps of `right` first, which come later in the row
    GaeMap map;
    map.a = a * right.a;
    map.b = mul_add(a, right.b, b * right.w);
    map.c = mul_add(a, right.c, mul_add(b, right.v, c));
    map.w = w * right.w;
    map.v = mul_add(w, right.v, v);
    return map;
  }
  FASTRL_METHOD GaeState<A> operator()(const GaeState<A>& state) const {
    GaeState<A> next;
    next.advantage = mul_add(a, state.advantage, mul_add(b, state.next_value, c));
    next.next_value = mul_add(w, state.next_value, v);
    return next;
  }
};

}  // namespace
}  // namespace fastrl
