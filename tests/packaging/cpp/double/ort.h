// The part of ONNX Runtime's C API that the double needs, by position in its table of functions.
// Positions never change: the table is only ever appended to. Declared here because the Python
// package carries the library and not its header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Api;
struct Env;
struct Status;
struct Session;
struct SessionOptions;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct MemoryInfo;
struct Allocator;

struct ApiBase {
  void* const* (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

enum ElementType { kFloat = 1, kUint8 = 2, kInt64 = 7, kHalf = 10 };

enum Position {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSessionFromArray = 8,
  kRun = 9,
  kCreateSessionOptions = 10,
  kDisableCpuMemArena = 19,
  kSetIntraOpNumThreads = 24,
  kSetInterOpNumThreads = 25,
  kSessionGetInputCount = 30,
  kSessionGetOutputCount = 31,
  kSessionGetInputTypeInfo = 33,
  kSessionGetOutputTypeInfo = 34,
  kSessionGetInputName = 36,
  kSessionGetOutputName = 37,
  kCreateTensorWithDataAsOrtValue = 49,
  kCastTypeInfoToTensorInfo = 55,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kCreateCpuMemoryInfo = 69,
  kAllocatorFree = 76,
  kGetAllocatorWithDefaultOptions = 78,
  kReleaseStatus = 93,
  kReleaseMemoryInfo = 94,
  kReleaseSession = 95,
  kReleaseValue = 96,
  kReleaseTypeInfo = 98,
  kReleaseSessionOptions = 100,
};

// ONNX Runtime's table, loaded on first use from $SPACH_DOUBLE_ORT; null where that fails.
void* const* table();

// Calls the function at a position. Arguments must be of the very types that it takes.
template <typename Returned = Status*, typename... Arguments>
Returned call(Position position, Arguments... arguments) {
  return reinterpret_cast<Returned (*)(Arguments...)>(table()[position])(arguments...);
}

}  // namespace ort
