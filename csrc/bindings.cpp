// The extension fastrl_kernels._C: pointers and sizes in, nothing of torch. Every argument was validated in Python
// (fastrl_kernels/cpu.py), which also keeps the tensors alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/advantages.h"
#include "cpu/rows.h"
#if defined(FASTRL_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;
using fastrl::RowKernels;

namespace {

std::vector<const RowKernels*> usable_row_kernels() {  // best last
  std::vector<const RowKernels*> kernels{&fastrl::row_kernels_generic()};
#if defined(FASTRL_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(&fastrl::row_kernels_avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    kernels.push_back(&fastrl::row_kernels_avx512());
#endif
  return kernels;
}

const RowKernels* current_kernels = usable_row_kernels().back();

// Rows are split evenly over `threads` threads that live for this call only: no second thread pool beside torch's, and
// nothing to break in a forked worker. Where a thread can't be started, the caller does its share.
template <typename Work>
void parallel_rows(int64_t rows, int threads, const Work& work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  std::vector<std::thread> pool;
  pool.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    try {
      pool.emplace_back([&work, begin, end] { work(begin, end); });
    } catch (const std::system_error&) {
      work(begin, end);
    }
  }
  work(0, rows / parts);
  for (auto& thread : pool) thread.join();
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void row_stats(int dtype, uintptr_t tile, int64_t rows, int64_t cols, int64_t stride, uintptr_t ids, double temperature,
               double logit_scale, double softcap, uintptr_t bias, uintptr_t row_max, uintptr_t log_sum, uintptr_t logps,
               uintptr_t mean, int threads) {
  const fastrl::StatsArgs args{static_cast<fastrl::DType>(dtype), pointer<void>(tile), rows, cols, stride,
                               pointer<int64_t>(ids), {temperature, logit_scale, softcap, pointer<void>(bias)},
                               pointer<void>(row_max), pointer<void>(log_sum), pointer<void>(logps), pointer<void>(mean)};
  py::gil_scoped_release release;
  parallel_rows(rows, threads, [&](int64_t begin, int64_t end) { current_kernels->stats(args, begin, end); });
}

void row_grad(int dtype, uintptr_t tile, int64_t cols, int64_t stride, uintptr_t out, int64_t out_stride, uintptr_t ids,
              double temperature, double logit_scale, double softcap, uintptr_t bias, uintptr_t row_max, uintptr_t log_sum,
              uintptr_t mean, uintptr_t grad_logps, uintptr_t grad_entropy, uintptr_t grad_lse, uintptr_t source,
              uintptr_t target, int64_t moves, int threads) {
  const fastrl::GradArgs args{static_cast<fastrl::DType>(dtype), pointer<void>(tile), cols, stride,
                              static_cast<fastrl::DType>(dtype), pointer<void>(out), out_stride, pointer<int64_t>(ids), {temperature, logit_scale, softcap, pointer<void>(bias)},
                              pointer<void>(row_max), pointer<void>(log_sum), pointer<void>(mean),
                              pointer<void>(grad_logps), pointer<void>(grad_entropy), pointer<void>(grad_lse),
                              pointer<int64_t>(source), pointer<int64_t>(target), moves};
  py::gil_scoped_release release;
  parallel_rows(moves, threads, [&](int64_t begin, int64_t end) { current_kernels->grad(args, begin, end); });
}

// Tokens per thread under which starting a thread costs more than it saves.
constexpr int64_t kTokensPerThread = 1 << 15;

void policy_terms(bool fp64, int64_t rows, int64_t cols, uintptr_t logps, uintptr_t entropy, uintptr_t advantages,
                  bool row_advantages, uintptr_t old_logps, uintptr_t ref_logps, uintptr_t gate, bool row_gate,
                  uintptr_t scored, uintptr_t mask, uintptr_t live, uintptr_t token_weight, uintptr_t entropy_weight,
                  double low, double high, double delta, double beta, int kl, bool kl_times_ratio, bool sequence,
                  uintptr_t terms, uintptr_t grad_logps, uintptr_t grad_entropy, uintptr_t sums, int threads) {
  const fastrl::PolicyTermsArgs args{
      fp64, rows, cols, pointer<void>(logps), pointer<void>(entropy), pointer<void>(advantages), row_advantages,
      pointer<void>(old_logps), pointer<void>(ref_logps), pointer<void>(gate), row_gate, pointer<uint8_t>(scored),
      pointer<uint8_t>(mask), pointer<uint8_t>(live), pointer<void>(token_weight), pointer<void>(entropy_weight), low, high,
      delta, beta, static_cast<fastrl::KlEstimator>(kl), kl_times_ratio, sequence, pointer<void>(terms),
      pointer<void>(grad_logps), pointer<void>(grad_entropy), pointer<double>(sums)};
  const int64_t most = std::max<int64_t>(1, rows * cols / kTokensPerThread);
  py::gil_scoped_release release;
  parallel_rows(rows, static_cast<int>(std::min<int64_t>(threads, most)),
                [&](int64_t begin, int64_t end) { current_kernels->policy_terms(args, begin, end); });
}

void group_advantages(int dtype, uintptr_t rewards, uintptr_t group_ids, int64_t count, int baseline, int scale, double eps,
                      uintptr_t advantages) {
  const auto b = static_cast<fastrl::Baseline>(baseline);
  const auto s = static_cast<fastrl::Scale>(scale);
  py::gil_scoped_release release;
  if (static_cast<fastrl::DType>(dtype) == fastrl::DType::kFloat64)
    fastrl::group_advantages(pointer<double>(rewards), pointer<int64_t>(group_ids), count, b, s, eps, pointer<double>(advantages));
  else
    fastrl::group_advantages(pointer<float>(rewards), pointer<int64_t>(group_ids), count, b, s, eps, pointer<float>(advantages));
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto* kernels : usable_row_kernels()) names.emplace_back(kernels->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const auto* kernels : usable_row_kernels()) {
    if (name == kernels->name) {
      current_kernels = kernels;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not built or this processor lacks it");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Row kernels of fastrl; call them through fastrl_kernels.cpu, which validates the arguments.";
  m.def("row_stats", &row_stats);
  m.def("row_grad", &row_grad);
  m.def("policy_terms", &policy_terms);
  m.def("group_advantages", &group_advantages);
  m.def("instruction_sets", &instruction_sets, "Builds of the row kernels that run on this processor, best last.");
  m.def("instruction_set", [] { return std::string(current_kernels->name); }, "The build in use.");
  m.def("use_instruction_set", &use_instruction_set, "Force one of instruction_sets(); ValueError for any other.");
  m.attr("compiler") = FASTRL_COMPILER;
#if defined(FASTRL_WITH_CUDA)
  m.attr("cuda_version") = fastrl::cuda_compiled_version();
  m.def("cuda_device_count", &fastrl::cuda_device_count);
#else
  m.attr("cuda_version") = py::none();
#endif
}
