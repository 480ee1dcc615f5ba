// A CUDA runtime without a GPU. Device memory is host memory that the double keeps a list of, so a
// copy in the wrong direction is an error here too. Work put on a stream is done when the stream is
// waited for and not before: a missing wait shows as a wrong answer.
//
//   SPACH_DOUBLE_DEVICES  number of GPUs (1); 0: no driver
//   SPACH_DOUBLE_GPU      compute capability as 10 * major + minor (89)
//   SPACH_DOUBLE_FAIL     "cudaMalloc:3": the third call of that function fails

#include "cuda_double.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

thread_local int current_device = 0;

std::mutex memory_mutex;
std::map<const char*, std::size_t>& device_memory() {
  static std::map<const char*, std::size_t> blocks;
  return blocks;
}

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

}  // namespace

namespace spach_double {

bool should_fail(const char* function) {
  static std::atomic<int> calls{0};
  const char* text = std::getenv("SPACH_DOUBLE_FAIL");
  if (text == nullptr) return false;
  const std::string wanted = text;
  const std::size_t colon = wanted.find(':');
  if (wanted.substr(0, colon) != function) return false;
  return ++calls == std::atoi(wanted.c_str() + colon + 1);
}

bool is_device_memory(const void* memory, std::size_t size) {
  const auto* at = static_cast<const char*>(memory);
  const std::lock_guard<std::mutex> lock(memory_mutex);
  auto next = device_memory().upper_bound(at);
  if (next == device_memory().begin()) return false;
  const auto& [start, length] = *--next;
  return at + size <= start + length;
}

int gpu() {
  return setting("SPACH_DOUBLE_GPU", 89);
}

}  // namespace spach_double

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = setting("SPACH_DOUBLE_DEVICES", 1);
  return *count > 0 ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= setting("SPACH_DOUBLE_DEVICES", 1)) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int) {
  const int gpu = spach_double::gpu();
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? gpu / 10 : gpu % 10;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t size) {
  if (spach_double::should_fail("cudaMalloc")) return cudaErrorMemoryAllocation;
  *memory = std::malloc(size);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0x7f, size);  // what was never written must not look like an answer
  const std::lock_guard<std::mutex> lock(memory_mutex);
  device_memory()[static_cast<const char*>(*memory)] = size;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  {
    const std::lock_guard<std::mutex> lock(memory_mutex);
    if (device_memory().erase(static_cast<const char*>(memory)) == 0) return cudaErrorInvalidValue;
  }
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, size_t size) {
  if (spach_double::should_fail("cudaMallocHost")) return cudaErrorMemoryAllocation;
  *memory = std::malloc(size);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (spach_double::should_fail("cudaMemcpyAsync")) return cudaErrorInvalidValue;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (spach_double::is_device_memory(to, count) != to_device) return cudaErrorInvalidValue;
  if (spach_double::is_device_memory(from, count) != from_device) return cudaErrorInvalidValue;
  spach_double::put(stream, [=] {
    std::memcpy(to, from, count);
    return cudaSuccess;
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  if (spach_double::should_fail("cudaStreamCreateWithFlags")) return cudaErrorMemoryAllocation;
  *stream = new CUstream_st();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const cudaError_t error = cudaStreamSynchronize(stream);
  delete stream;
  return error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (const spach_double::Work& work : stream->pending)
    if (error == cudaSuccess) error = work();
  stream->pending.clear();
  return spach_double::should_fail("cudaStreamSynchronize") ? cudaErrorLaunchFailure : error;
}

}  // extern "C"
