#include "kernels.h"

#include <cuda_runtime.h>

namespace fastrl::cuda {

int compiled_version() { return CUDART_VERSION; }

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is an answer, not an error to leave behind
    return 0;
  }
  return count;
}

}  // namespace fastrl::cuda
