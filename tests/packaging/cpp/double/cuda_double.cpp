// A CUDA runtime without a GPU. Device memory is host memory that the double keeps a list of, so a
// copy in the wrong direction is an error here too. Work put on a stream is done when the stream is
// waited for and not before: a missing wait shows as a wrong answer.
//
//   SPACH_DOUBLE_DEVICES  number of GPUs (1); 0: no driver
//   SPACH_DOUBLE_GPU      compute capability as 10 * major + minor (89)
//   SPACH_DOUBLE_PROCESSORS  multiprocessors (128)
//   SPACH_DOUBLE_FAIL     "cudaMalloc:3": the third call of that function fails

#include "cuda_double.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace {

thread_local int current_device = 0;

std::mutex memory_mutex;
using Blocks = std::map<const char*, std::size_t>;
Blocks& device_memory() {
  static Blocks blocks;
  return blocks;
}
Blocks& pinned_memory() {
  static Blocks blocks;
  return blocks;
}

bool is_within(const Blocks& blocks, const void* memory, std::size_t size) {
  const auto* at = static_cast<const char*>(memory);
  const std::lock_guard<std::mutex> lock(memory_mutex);
  auto next = blocks.upper_bound(at);
  if (next == blocks.begin()) return false;
  const auto& [start, length] = *--next;
  return at + size <= start + length;
}

void remember(Blocks& blocks, void* memory, std::size_t size) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  blocks[static_cast<const char*>(memory)] = size;
}

bool forget(Blocks& blocks, void* memory) {
  const std::lock_guard<std::mutex> lock(memory_mutex);
  return blocks.erase(static_cast<const char*>(memory)) != 0;
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
  return is_within(device_memory(), memory, size);
}

bool is_pinned_memory(const void* memory, std::size_t size) {
  return is_within(pinned_memory(), memory, size);
}

int gpu() {
  return setting("SPACH_DOUBLE_GPU", 89);
}

}  // namespace spach_double

cudaError_t CUstream_st::reach(std::uint64_t count) {
  for (; done < count; ++done) {
    if (error == cudaSuccess) error = pending.front()();
    pending.pop_front();
  }
  return std::exchange(error, cudaSuccess);
}

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
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = setting("SPACH_DOUBLE_PROCESSORS", 128); break;
    case cudaDevAttrComputeCapabilityMajor: *value = gpu / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu % 10; break;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t size) {
  if (spach_double::should_fail("cudaMalloc")) return cudaErrorMemoryAllocation;
  *memory = std::malloc(size);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0x7f, size);  // what was never written must not look like an answer
  remember(device_memory(), *memory, size);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  if (!forget(device_memory(), memory)) return cudaErrorInvalidValue;
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, size_t size) {
  if (spach_double::should_fail("cudaMallocHost")) return cudaErrorMemoryAllocation;
  *memory = std::malloc(size);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  remember(pinned_memory(), *memory, size);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  if (!forget(pinned_memory(), memory)) return cudaErrorInvalidValue;
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
  const cudaError_t error = stream->reach(stream->end());
  return spach_double::should_fail("cudaStreamSynchronize") ? cudaErrorLaunchFailure : error;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  if (spach_double::should_fail("cudaEventCreateWithFlags")) return cudaErrorMemoryAllocation;
  *event = new CUevent_st();
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (spach_double::should_fail("cudaEventRecord")) return cudaErrorInvalidValue;
  *event = {stream, stream->end()};
  return cudaSuccess;
}

// What was put on the stream after the event waits on.
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (spach_double::should_fail("cudaEventSynchronize")) return cudaErrorLaunchFailure;
  return event->stream != nullptr ? event->stream->reach(event->count) : cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

}  // extern "C"
