// What the CUDA runtime hands out, owned.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

#include "spach/result.h"

namespace spach::cuda {

Status checked(cudaError_t error, const char* what);

struct FreeDevice {
  void operator()(void* memory) const noexcept { cudaFree(memory); }
};
struct FreePinned {
  void operator()(void* memory) const noexcept { cudaFreeHost(memory); }
};
struct DestroyStream {
  void operator()(cudaStream_t stream) const noexcept { cudaStreamDestroy(stream); }
};

struct DestroyEvent {
  void operator()(cudaEvent_t event) const noexcept { cudaEventDestroy(event); }
};

using DeviceMemory = std::unique_ptr<void, FreeDevice>;
using PinnedMemory = std::unique_ptr<void, FreePinned>;  // the host's, page-locked
using Stream = std::unique_ptr<CUstream_st, DestroyStream>;
using Event = std::unique_ptr<CUevent_st, DestroyEvent>;

Result<DeviceMemory> device_memory(std::size_t bytes);
Result<PinnedMemory> pinned_memory(std::size_t bytes);
Result<Stream> make_stream();
Result<Event> make_event();

// Makes `device` this thread's, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) noexcept;
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  Status status() const { return checked(error_, "cudaSetDevice"); }

 private:
  int before_ = -1;
  cudaError_t error_ = cudaSuccess;
};

// How many GPUs there are; an error that says why where there are none.
Result<int> device_count();

// Compute capability as 10 * major + minor, 0 where it cannot be told.
int compute_capability(int device) noexcept;

// A GPU's kind as text, such as "sm89-128": its compute capability and number of multiprocessors.
std::string kind_of(int device);

}  // namespace spach::cuda
