// Row pass 2: a tile of raw products becomes a tile of their gradients, in 16-byte packets, in place or into another tile
// (in half precision for the tensor cores), rows moving if asked. Never builds the probabilities beside it.
#include "kernels.h"
#include "rows.cuh"

namespace fastrl::cuda {
namespace {

constexpr int kStepsPerBlock = 4;

// A packet is as wide as the wider of the two elements allows: 16 bytes there, and as many elements of the other.
template <typename T, typename Out>
constexpr int kPacket = 16 / (sizeof(T) > sizeof(Out) ? sizeof(T) : sizeof(Out));

template <typename T, typename Out, bool kCap, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident - 1) row_grad_kernel(const GradArgs a,
                                                            const Logit<typename Accumulator<T>::type> logit,
                                                            const int blocks_per_row) {
  using A = typename Accumulator<T>::type;
  constexpr int W = kPacket<T, Out>;
  constexpr int64_t kStep = kStepColumns<W>;
  const int64_t move = blockIdx.x / blocks_per_row;
  const int64_t from = a.source ? a.source[move] : move;
  const int64_t to = a.target ? a.target[move] : move;
  const T* x = static_cast<const T*>(a.tile) + from * a.stride;
  Out* out = static_cast<Out*>(a.out) + to * a.out_stride;
  const int64_t before = lead<W>(x);
  const bool aligned = is_aligned<W>(out - before);
  const RowGradient<A> gradient(a, from);

  for (int64_t column = blockIdx.x % blocks_per_row * kStep + threadIdx.x * W - before; column < a.cols;
       column += blocks_per_row * kStep) {
    Packet<T, W> packets[kLoads];
    read_step(x, column, a.cols, packets);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int64_t first = column + l * kThreads * W;
      A z[W], slope[W], g[W];
      logits_of<kCap>(logit, packets[l], first, a.cols, z, slope);
#pragma unroll
      for (int k = 0; k < W; ++k) g[k] = gradient.template operator()<kEntropy>(z[k], slope[k]);
      if (gradient.id >= first && gradient.id < first + W) {
#pragma unroll
        for (int k = 0; k < W; ++k) g[k] += first + k == gradient.id ? gradient.g_logp * slope[k] : A(0);
      }
      Packet<Out, W> packet;
#pragma unroll
      for (int k = 0; k < W; ++k) store(&packet.x[k], g[k]);
      write(out, first, a.cols, packet, aligned);
    }
  }
}

template <typename T, typename Out, bool kCap>
void launch_grad(const GradArgs& a, void* stream) {
  const int64_t blocks = (a.cols - 1) / (kStepsPerBlock * kStepColumns<kPacket<T, Out>>) + 1;
  launch("row_grad", a.grad_entropy ? row_grad_kernel<T, Out, kCap, true> : row_grad_kernel<T, Out, kCap, false>,
         a.moves * blocks, 1, 0, stream, a, Logit<typename Accumulator<T>::type>(a.transform), static_cast<int>(blocks));
}

template <typename T, typename Out>
void launch_grad(const GradArgs& a, void* stream) {
  a.transform.softcap > 0 ? launch_grad<T, Out, true>(a, stream) : launch_grad<T, Out, false>(a, stream);
}

}  // namespace

void row_grad(const GradArgs& a, void* stream) {
  const bool same = a.out_dtype == a.dtype;
  if (a.dtype == DType::kFloat64 && same) return launch_grad<double, double>(a, stream);
  if (a.dtype == DType::kBFloat16 && same) return launch_grad<BFloat16, BFloat16>(a, stream);
  if (a.dtype == DType::kFloat16 && same) return launch_grad<Float16, Float16>(a, stream);
  if (a.dtype == DType::kFloat32 && same) return launch_grad<float, float>(a, stream);
  if (a.dtype == DType::kFloat32 && a.out_dtype == DType::kBFloat16) return launch_grad<float, BFloat16>(a, stream);
  if (a.dtype == DType::kFloat32 && a.out_dtype == DType::kFloat16) return launch_grad<float, Float16>(a, stream);
  throw std::invalid_argument("row_grad: out is of the tile's dtype, or bf16 or fp16 for an fp32 tile");
}

}  // namespace fastrl::cuda
