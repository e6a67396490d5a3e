// The row pass over two tiles on the CPU, in its builds per instruction set; see rows.h.
#pragma once

#include "../divergence.h"

namespace fastrl {

void divergence_generic(const DivergenceArgs& args, int64_t begin, int64_t end);
#if defined(FASTRL_X86)
void divergence_avx2(const DivergenceArgs& args, int64_t begin, int64_t end);
void divergence_avx512(const DivergenceArgs& args, int64_t begin, int64_t end);
#endif

}  // namespace fastrl
