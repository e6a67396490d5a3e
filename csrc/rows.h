// What the two row passes over a tile of raw logits take, on any device.
#pragma once

#include <cstdint>

namespace fastrl {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// logit = softcap * tanh((product + bias) * logit_scale / softcap) / temperature; softcap <= 0 means none.
struct Transform {
  double temperature;
  double logit_scale;
  double softcap;
  const void* bias;  // [V] in the accumulation type (float; double for a double tile), or null
};

// Accumulation type A: double for a double tile, float otherwise. All vectors are [rows] of A unless said.
struct StatsArgs {
  DType dtype;
  const void* tile;  // [rows, cols], elements of dtype
  int64_t rows, cols, stride;
  const int64_t* ids;  // [rows]; -1: the token is in another vocabulary shard, its logp is -inf
  Transform transform;
  void *row_max, *log_sum, *logps;
  void* mean;  // or null
};

struct GradArgs {
  DType dtype;
  const void* tile;
  int64_t cols, stride;
  DType out_dtype;
  void* out;  // [moves, cols] of out_dtype; may be the tile itself
  int64_t out_stride;
  const int64_t* ids;
  Transform transform;
  const void *row_max, *log_sum;
  const void* mean;                                  // null iff grad_entropy is null
  const void *grad_logps, *grad_entropy, *grad_lse;  // each may be null
  const int64_t *source, *target;                    // [moves], or both null: row i goes to row i
  int64_t moves;
};

}  // namespace fastrl
