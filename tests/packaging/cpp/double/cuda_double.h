#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <utility>

namespace spach_double {

using Work = std::function<cudaError_t()>;

// Whether SPACH_DOUBLE_FAIL names this call of `function`.
bool should_fail(const char* function);
bool is_device_memory(const void* memory, std::size_t size);
bool is_pinned_memory(const void* memory, std::size_t size);
int gpu();

}  // namespace spach_double

struct CUstream_st {
  std::deque<spach_double::Work> pending;
  std::uint64_t done = 0;  // pieces of work
  cudaError_t error = cudaSuccess;

  // Does what was put here until there are `count` pieces done.
  cudaError_t reach(std::uint64_t count);
  std::uint64_t end() const { return done + pending.size(); }
};

struct CUevent_st {
  CUstream_st* stream = nullptr;
  std::uint64_t count = 0;
};

namespace spach_double {

inline void put(cudaStream_t stream, Work work) {
  stream->pending.push_back(std::move(work));
}

}  // namespace spach_double
