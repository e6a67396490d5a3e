// What the CUDA part of the extension was built with and what it sees; `fastrl doctor` prints it.
#pragma once

namespace fastrl {

int cuda_compiled_version();  // CUDART_VERSION, 13000 for 13.0
int cuda_device_count();      // 0 where there is no driver or no device

}  // namespace fastrl
