#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <utility>
#include <vector>

namespace spach_double {

using Work = std::function<cudaError_t()>;

// Whether SPACH_DOUBLE_FAIL names this call of `function`.
bool should_fail(const char* function);
bool is_device_memory(const void* memory, std::size_t size);
int gpu();

}  // namespace spach_double

struct CUstream_st {
  std::vector<spach_double::Work> pending;
};

namespace spach_double {

inline void put(cudaStream_t stream, Work work) {
  stream->pending.push_back(std::move(work));
}

}  // namespace spach_double
