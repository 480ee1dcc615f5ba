// A stand-in for TensorRT's header of this name: only what the library uses, with the names,
// signatures and the layout that NVIDIA documents, so that a program compiled with it also links
// with the real library. A call goes through `mImpl`, as there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : int32_t {
  kFLOAT = 0,
  kHALF = 1,
  kINT8 = 2,
  kINT32 = 3,
  kBOOL = 4,
  kUINT8 = 5,
  kFP8 = 6,
  kBF16 = 7,
  kINT64 = 8,
};
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ExecutionContextAllocationStrategy : int32_t {
  kSTATIC = 0,
  kON_PROFILE_CHANGE = 1,
  kUSER_MANAGED = 2
};
enum class APILanguage : int32_t { kCPP = 0, kPYTHON = 1 };

class Dims64 {
 public:
  static constexpr int32_t MAX_DIMS{8};
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
using Dims = Dims64;

struct InterfaceInfo {
  AsciiChar const* kind;
  int32_t major;
  int32_t minor;
};

class IVersionedInterface {
 public:
  virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
  virtual ~IVersionedInterface() noexcept = default;
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
};

class ILogger : public IVersionedInterface {
 public:
  enum class Severity : int32_t {
    kINTERNAL_ERROR = 0,
    kERROR = 1,
    kWARNING = 2,
    kINFO = 3,
    kVERBOSE = 4
  };
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
};

class INoCopy {
 protected:
  INoCopy() = default;
  virtual ~INoCopy() = default;
  INoCopy(INoCopy const&) = delete;
  INoCopy& operator=(INoCopy const&) = delete;
};

class IExecutionContext;
class ICudaEngine;

namespace apiv {

class VRoot {
 public:
  virtual ~VRoot() noexcept = default;
};

class VExecutionContext : public VRoot {
 public:
  virtual bool setInputShape(char const* tensorName, Dims const& dims) noexcept = 0;
  virtual bool setTensorAddress(char const* tensorName, void* data) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class VCudaEngine : public VRoot {
 public:
  virtual int32_t getNbIOTensors() const noexcept = 0;
  virtual char const* getIOTensorName(int32_t index) const noexcept = 0;
  virtual TensorIOMode getTensorIOMode(char const* tensorName) const noexcept = 0;
  virtual DataType getTensorDataType(char const* tensorName) const noexcept = 0;
  virtual Dims getTensorShape(char const* tensorName) const noexcept = 0;
  virtual Dims getProfileShape(char const* tensorName, int32_t profileIndex,
                               OptProfileSelector select) const noexcept = 0;
  virtual IExecutionContext* createExecutionContext() noexcept = 0;
};

class VRuntime : public VRoot {
 public:
  virtual void* getPImpl() noexcept = 0;
  virtual ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept = 0;
};

}  // namespace apiv

class IExecutionContext : public INoCopy {
 public:
  virtual ~IExecutionContext() noexcept = default;
  bool setInputShape(char const* tensorName, Dims const& dims) noexcept {
    return mImpl->setInputShape(tensorName, dims);
  }
  bool setTensorAddress(char const* tensorName, void* data) noexcept {
    return mImpl->setTensorAddress(tensorName, data);
  }
  bool enqueueV3(cudaStream_t stream) noexcept { return mImpl->enqueueV3(stream); }

 protected:
  apiv::VExecutionContext* mImpl;
};

class ICudaEngine : public INoCopy {
 public:
  virtual ~ICudaEngine() noexcept = default;
  int32_t getNbIOTensors() const noexcept { return mImpl->getNbIOTensors(); }
  char const* getIOTensorName(int32_t index) const noexcept {
    return mImpl->getIOTensorName(index);
  }
  TensorIOMode getTensorIOMode(char const* tensorName) const noexcept {
    return mImpl->getTensorIOMode(tensorName);
  }
  DataType getTensorDataType(char const* tensorName) const noexcept {
    return mImpl->getTensorDataType(tensorName);
  }
  Dims getTensorShape(char const* tensorName) const noexcept {
    return mImpl->getTensorShape(tensorName);
  }
  Dims getProfileShape(char const* tensorName, int32_t profileIndex,
                       OptProfileSelector select) const noexcept {
    return mImpl->getProfileShape(tensorName, profileIndex, select);
  }
  IExecutionContext* createExecutionContext(
      ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy::kSTATIC) noexcept {
    return mImpl->createExecutionContext();
  }

 protected:
  apiv::VCudaEngine* mImpl;
};

class IRuntime : public INoCopy {
 public:
  virtual ~IRuntime() noexcept = default;
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
    return mImpl->deserializeCudaEngine(blob, size);
  }

 protected:
  apiv::VRuntime* mImpl;
};

}  // namespace nvinfer1

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept;
extern "C" int32_t getInferLibVersion() noexcept;

namespace nvinfer1 {
namespace {
inline IRuntime* createInferRuntime(ILogger& logger) noexcept {
  return static_cast<IRuntime*>(createInferRuntime_INTERNAL(&logger, getInferLibVersion()));
}
}  // namespace
}  // namespace nvinfer1
