#include "cuda.h"

namespace spach::cuda {

Status checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Done{};
  const ErrorCode code =
      error == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::cuda;
  return Error{code, std::string(what) + ": " + cudaGetErrorString(error) + "."};
}

Result<DeviceMemory> device_memory(std::size_t bytes) {
  void* memory = nullptr;
  if (Status status = checked(cudaMalloc(&memory, bytes), "cudaMalloc"); !status)
    return status.error();
  return DeviceMemory(memory);
}

Result<PinnedMemory> pinned_memory(std::size_t bytes) {
  void* memory = nullptr;
  if (Status status = checked(cudaMallocHost(&memory, bytes), "cudaMallocHost"); !status)
    return status.error();
  return PinnedMemory(memory);
}

Result<Stream> make_stream() {
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (Status status = checked(error, "cudaStreamCreateWithFlags"); !status) return status.error();
  return Stream(stream);
}

Result<Event> make_event() {
  cudaEvent_t event = nullptr;
  const cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (Status status = checked(error, "cudaEventCreateWithFlags"); !status) return status.error();
  return Event(event);
}

OnDevice::OnDevice(int device) noexcept {
  error_ = cudaGetDevice(&before_);
  if (error_ == cudaSuccess && before_ == device) {
    before_ = -1;  // nothing to undo
  } else if (error_ == cudaSuccess) {
    error_ = cudaSetDevice(device);
  }
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Result<int> device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return count;
  const std::string reason = error == cudaSuccess ? "none is visible" : cudaGetErrorString(error);
  return Error{ErrorCode::no_gpu, "No NVIDIA GPU with a working driver was found: " + reason + "."};
}

int compute_capability(int device) noexcept {
  int major = 0, minor = 0;
  const bool known =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known ? 10 * major + minor : 0;
}

std::string kind_of(int device) {
  int processors = 0;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    processors = 0;
  return "sm" + std::to_string(compute_capability(device)) + "-" + std::to_string(processors);
}

}  // namespace spach::cuda
