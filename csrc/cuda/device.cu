#include "device.h"

#include <cuda_runtime.h>

namespace fastrl {

int cuda_compiled_version() { return CUDART_VERSION; }

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error to leave behind
    return 0;
  }
  return count;
}

}  // namespace fastrl
