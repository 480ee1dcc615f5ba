// The two functions that a program takes from TensorRT's library by name, of one that can do
// nothing.

#include <NvInfer.h>

extern "C" int32_t getInferLibVersion() noexcept {
  return 10701;
}

extern "C" void* createInferRuntime_INTERNAL(void*, int32_t) noexcept {
  return nullptr;
}
