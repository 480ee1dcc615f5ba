// TensorRT's interfaces, with ONNX Runtime behind them. A plan of the double is a plan's header,
// what a builder would have fixed (profile, GPUs) and the ONNX graph itself:
//
//   64 bytes  as TensorRT writes them: magic, size (vtrt), version at byte 24
//   16 bytes  "SPACH-DOUBLE\n", padded with zeros
//   5 x u32   smallest, usual and largest batch, number of GPUs, bytes of the graph
//   n x u32   GPUs, 10 * major + minor
//   the graph
//
//   SPACH_DOUBLE_VERSION  the version of this library as getInferLibVersion gives it (10701)
//   SPACH_DOUBLE_FAIL     also createInferRuntime, createExecutionContext, enqueueV3, and of
//   TensorRT
//                         for RTX createRuntimeConfig, createRuntimeCache, setRuntimeCache,
//                         serialize, deserialize, setCudaGraphStrategy
//   SPACH_DOUBLE_TRACE    a file, to which a line is added for each kernel that is compiled or
//   found
//                         in the runtime cache, and for each CUDA graph that is captured or
//                         launched
//   SPACH_DOUBLE_REPLACES  a runtime cache forgets what it has when it reads more; it is not known
//                         whether TensorRT's does

#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda_double.h"
#include "ort.h"

namespace ort {

void* const* table() {
  static void* const* const functions = []() -> void* const* {
    const char* path = std::getenv("SPACH_DOUBLE_ORT");
    void* library = path != nullptr ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    void* entry = library != nullptr ? dlsym(library, "OrtGetApiBase") : nullptr;
    if (entry == nullptr) return nullptr;
    return reinterpret_cast<const ApiBase* (*)()>(entry)()->get_api(1);
  }();
  return functions;
}

}  // namespace ort

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::ILogger;
using nvinfer1::OptProfileSelector;
using nvinfer1::TensorIOMode;

struct Tensor {
  std::string name;
  TensorIOMode mode;
  DataType dtype;
  Dims dims;  // -1 where it is free
};

ort::ElementType element_type(DataType dtype) {
  switch (dtype) {
    case DataType::kHALF: return ort::kHalf;
    case DataType::kUINT8: return ort::kUint8;
    case DataType::kINT64: return ort::kInt64;
    default: return ort::kFloat;
  }
}

DataType data_type(int element) {
  switch (element) {
    case ort::kHalf: return DataType::kHALF;
    case ort::kUint8: return DataType::kUINT8;
    case ort::kInt64: return DataType::kINT64;
    case ort::kFloat: return DataType::kFLOAT;
    default: return DataType::kBOOL;
  }
}

std::size_t bytes_of(DataType dtype) {
  switch (dtype) {
    case DataType::kHALF: return 2;
    case DataType::kINT64: return 8;
    case DataType::kFLOAT: return 4;
    default: return 1;
  }
}

std::size_t volume(const Dims& dims) {
  std::size_t items = 1;
  for (int i = 0; i < dims.nbDims; ++i) items *= static_cast<std::size_t>(dims.d[i]);
  return items;
}

// The message of a failed call, or "".
std::string problem(ort::Status* status) {
  if (status == nullptr) return {};
  std::string message =
      ort::call<const char*>(ort::kGetErrorMessage, static_cast<const ort::Status*>(status));
  ort::call<void>(ort::kReleaseStatus, status);
  return message;
}

ort::Env* environment() {
  static ort::Env* const env = [] {
    ort::Env* made = nullptr;
    problem(ort::call(ort::kCreateEnv, 3, "double", &made));  // 3: errors only
    return made;
  }();
  return env;
}

// One graph in ONNX Runtime, on one thread.
class Session {
 public:
  ~Session() {
    if (session_ != nullptr) ort::call<void>(ort::kReleaseSession, session_);
  }

  std::string load(const std::string& graph) {
    ort::SessionOptions* options = nullptr;
    problem(ort::call(ort::kCreateSessionOptions, &options));
    problem(ort::call(ort::kSetIntraOpNumThreads, options, 1));
    problem(ort::call(ort::kSetInterOpNumThreads, options, 1));
    problem(ort::call(ort::kDisableCpuMemArena, options));
    const std::string failed =
        problem(ort::call(ort::kCreateSessionFromArray, static_cast<const ort::Env*>(environment()),
                          static_cast<const void*>(graph.data()), graph.size(),
                          static_cast<const ort::SessionOptions*>(options), &session_));
    ort::call<void>(ort::kReleaseSessionOptions, options);
    return failed;
  }

  std::vector<Tensor> tensors() const {
    std::vector<Tensor> all;
    describe(ort::kSessionGetInputCount, ort::kSessionGetInputName, ort::kSessionGetInputTypeInfo,
             TensorIOMode::kINPUT, all);
    describe(ort::kSessionGetOutputCount, ort::kSessionGetOutputName,
             ort::kSessionGetOutputTypeInfo, TensorIOMode::kOUTPUT, all);
    return all;
  }

  // Runs from and to `addresses`, with `batch` in place of a free leading extent.
  std::string run(const std::vector<Tensor>& tensors, const std::map<std::string, void*>& addresses,
                  std::int64_t batch) const {
    std::vector<const char*> input_names, output_names;
    std::vector<ort::Value*> inputs, outputs;
    for (const Tensor& tensor : tensors) {
      const bool is_input = tensor.mode == TensorIOMode::kINPUT;
      (is_input ? input_names : output_names).push_back(tensor.name.c_str());
      (is_input ? inputs : outputs).push_back(wrap(tensor, addresses.at(tensor.name), batch));
    }
    std::vector<const ort::Value*> given(inputs.begin(), inputs.end());
    const std::string failed = problem(ort::call(
        ort::kRun, session_, static_cast<const void*>(nullptr),
        static_cast<const char* const*>(input_names.data()),
        static_cast<const ort::Value* const*>(given.data()), given.size(),
        static_cast<const char* const*>(output_names.data()), output_names.size(), outputs.data()));
    for (ort::Value* value : inputs) ort::call<void>(ort::kReleaseValue, value);
    for (ort::Value* value : outputs) ort::call<void>(ort::kReleaseValue, value);
    return failed;
  }

 private:
  void describe(ort::Position counter, ort::Position namer, ort::Position typer, TensorIOMode mode,
                std::vector<Tensor>& all) const {
    const auto* session = static_cast<const ort::Session*>(session_);
    ort::Allocator* allocator = nullptr;
    problem(ort::call(ort::kGetAllocatorWithDefaultOptions, &allocator));
    std::size_t count = 0;
    problem(ort::call(counter, session, &count));
    for (std::size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      ort::TypeInfo* type = nullptr;
      problem(ort::call(namer, session, i, allocator, &name));
      problem(ort::call(typer, session, i, &type));
      const ort::TensorInfo* info = nullptr;
      problem(ort::call(ort::kCastTypeInfoToTensorInfo, static_cast<const ort::TypeInfo*>(type),
                        &info));
      int element = 0;
      std::size_t rank = 0;
      problem(ort::call(ort::kGetTensorElementType, info, &element));
      problem(ort::call(ort::kGetDimensionsCount, info, &rank));
      Tensor tensor{name, mode, data_type(element), {}};
      tensor.dims.nbDims = static_cast<std::int32_t>(rank < 8 ? rank : 8);
      problem(ort::call(ort::kGetDimensions, info, tensor.dims.d,
                        static_cast<std::size_t>(tensor.dims.nbDims)));
      all.push_back(tensor);
      ort::call<void>(ort::kReleaseTypeInfo, type);
      problem(ort::call(ort::kAllocatorFree, allocator, static_cast<void*>(name)));
    }
  }

  static ort::Value* wrap(const Tensor& tensor, void* memory, std::int64_t batch) {
    Dims dims = tensor.dims;
    if (dims.d[0] < 0) dims.d[0] = batch;
    ort::MemoryInfo* info = nullptr;
    problem(ort::call(ort::kCreateCpuMemoryInfo, 1, 0, &info));
    ort::Value* value = nullptr;
    problem(
        ort::call(ort::kCreateTensorWithDataAsOrtValue, static_cast<const ort::MemoryInfo*>(info),
                  memory, volume(dims) * bytes_of(tensor.dtype),
                  static_cast<const std::int64_t*>(dims.d), static_cast<std::size_t>(dims.nbDims),
                  static_cast<int>(element_type(tensor.dtype)), &value));
    ort::call<void>(ort::kReleaseMemoryInfo, info);
    return value;
  }

  ort::Session* session_ = nullptr;
};

// What a plan of the double holds.
struct Plan {
  std::uint32_t batches[3] = {};
  std::vector<std::uint32_t> gpus;
  std::string graph;
};

void complain(ILogger& logger, const std::string& text) {
  logger.log(ILogger::Severity::kERROR, text.c_str());
}

void trace(const std::string& what) {
  const char* path = std::getenv("SPACH_DOUBLE_TRACE");
  if (path == nullptr) return;
  std::FILE* file = std::fopen(path, "a");
  if (file == nullptr) return;
  std::fprintf(file, "%s\n", what.c_str());
  std::fclose(file);
}

class HostMemory final : public nvinfer1::IHostMemory, public nvinfer1::apiv::VHostMemory {
 public:
  explicit HostMemory(std::string content) : content_(std::move(content)) { mImpl = this; }
  void* data() const noexcept override { return const_cast<char*>(content_.data()); }
  std::size_t size() const noexcept override { return content_.size(); }
  DataType type() const noexcept override { return DataType::kINT8; }

 private:
  std::string content_;
};

// Kernels by name, one a line under a line that says for which version and GPU they are.
class RuntimeCache final : public nvinfer1::IRuntimeCache, public nvinfer1::apiv::VRuntimeCache {
 public:
  explicit RuntimeCache(ILogger& logger) : logger_(logger) { mImpl = this; }

  nvinfer1::IHostMemory* serialize() const noexcept override {
    if (spach_double::should_fail("serialize")) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string text = kernels_.empty() ? std::string() : first_line();
    for (const std::string& kernel : kernels_) text += kernel + "\n";
    return new HostMemory(text);
  }

  bool deserialize(void const* blob, size_t size) noexcept override {
    const std::string text(static_cast<const char*>(blob), size);
    const std::string first = first_line();
    if (spach_double::should_fail("deserialize") || text.compare(0, first.size(), first) != 0) {
      complain(logger_, "The runtime cache is incompatible.");
      return false;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::getenv("SPACH_DOUBLE_REPLACES") != nullptr) kernels_.clear();
    for (std::size_t at = first.size(); at < text.size();) {
      const std::size_t end = text.find('\n', at);
      kernels_.insert(text.substr(at, end - at));
      at = end + 1;
    }
    return true;
  }

  bool reset() noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    kernels_.clear();
    return true;
  }

  // Whether a kernel is here. It is afterwards.
  bool have(const std::string& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !kernels_.insert(kernel).second;
  }

 private:
  static std::string first_line() {
    return "kernels " + std::to_string(getInferLibVersion()) + " " +
           std::to_string(spach_double::gpu()) + "\n";
  }

  ILogger& logger_;
  mutable std::mutex mutex_;
  std::set<std::string> kernels_;
};

using nvinfer1::CudaGraphStrategy;
using Specialization = nvinfer1::DynamicShapesKernelSpecializationStrategy;

class RuntimeConfig final : public nvinfer1::IRuntimeConfig, public nvinfer1::apiv::VRuntimeConfig {
 public:
  explicit RuntimeConfig(ILogger& logger) : logger_(logger) { mImpl = this; }

  nvinfer1::IRuntimeConfig* getPImpl() noexcept override { return this; }
  void setExecutionContextAllocationStrategy(
      nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
    allocation_ = strategy;
  }
  nvinfer1::ExecutionContextAllocationStrategy getExecutionContextAllocationStrategy()
      const noexcept override {
    return allocation_;
  }
  nvinfer1::IRuntimeCache* createRuntimeCache() const noexcept override {
    if (spach_double::should_fail("createRuntimeCache")) return nullptr;
    return new RuntimeCache(logger_);
  }
  bool setRuntimeCache(nvinfer1::IRuntimeCache const& cache) noexcept override {
    if (spach_double::should_fail("setRuntimeCache")) return false;
    cache_ = const_cast<nvinfer1::IRuntimeCache*>(&cache);
    return true;
  }
  nvinfer1::IRuntimeCache* getRuntimeCache() const noexcept override { return cache_; }
  void setDynamicShapesKernelSpecializationStrategy(Specialization strategy) noexcept override {
    specialization_ = strategy;
  }
  Specialization getDynamicShapesKernelSpecializationStrategy() const noexcept override {
    return specialization_;
  }
  bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept override {
    if (spach_double::should_fail("setCudaGraphStrategy")) return false;
    graphs_ = strategy;
    return true;
  }
  CudaGraphStrategy getCudaGraphStrategy() const noexcept override { return graphs_; }

 private:
  ILogger& logger_;
  nvinfer1::ExecutionContextAllocationStrategy allocation_ =
      nvinfer1::ExecutionContextAllocationStrategy::kSTATIC;
  nvinfer1::IRuntimeCache* cache_ = nullptr;
  Specialization specialization_ = Specialization::kLAZY;
  CudaGraphStrategy graphs_ = CudaGraphStrategy::kDISABLED;
};

constexpr char kMark[16] = "SPACH-DOUBLE\n";

bool read_plan(const void* blob, std::size_t size, Plan& plan) {
  const auto* at = static_cast<const char*>(blob);
  std::size_t left = size;
  const auto take = [&](void* to, std::size_t count) {
    if (count > left) return false;
    std::memcpy(to, at, count);
    at += count;
    left -= count;
    return true;
  };
  char header[64], mark[sizeof kMark];
  std::uint32_t gpus = 0, graph = 0;
  if (!take(header, sizeof header) || !take(mark, sizeof mark)) return false;
  if (std::memcmp(mark, kMark, sizeof mark) != 0) return false;
  if (!take(plan.batches, sizeof plan.batches) || !take(&gpus, 4) || !take(&graph, 4)) return false;
  if (gpus > 16) return false;
  plan.gpus.resize(gpus);
  if (!take(plan.gpus.data(), 4 * std::size_t{gpus}) || graph != left) return false;
  plan.graph.assign(at, left);
  return true;
}

class Context final : public nvinfer1::IExecutionContext, public nvinfer1::apiv::VExecutionContext {
 public:
  // `config` is null for a context with the defaults; else it must live as long as the context.
  Context(ILogger& logger, const std::vector<Tensor>& tensors, const Plan& plan,
          nvinfer1::IRuntimeConfig* config)
      : logger_(logger), tensors_(tensors), plan_(plan), config_(config) {
    mImpl = this;
  }

  std::string load() { return session_->load(plan_.graph); }

  bool setInputShape(char const* name, Dims const& dims) noexcept override {
    const Tensor& input = tensors_.front();
    bool fits = name == input.name && dims.nbDims == input.dims.nbDims;
    for (int i = 1; fits && i < dims.nbDims; ++i) fits = dims.d[i] == input.dims.d[i];
    fits = fits && dims.d[0] >= plan_.batches[0] && dims.d[0] <= plan_.batches[2];
    if (!fits) complain(logger_, "setInputShape: the shape is outside the profile.");
    if (fits) batch_ = dims.d[0];
    return fits;
  }

  bool setTensorAddress(char const* name, void* data) noexcept override {
    for (const Tensor& tensor : tensors_)
      if (tensor.name == name) return addresses_[tensor.name] = data, true;
    complain(logger_, std::string("setTensorAddress: no tensor ") + name + ".");
    return false;
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (spach_double::should_fail("enqueueV3")) {
      complain(logger_, "enqueueV3: told to fail.");
      return false;
    }
    for (const Tensor& tensor : tensors_) {
      Dims dims = tensor.dims;
      if (dims.d[0] < 0) dims.d[0] = batch_;
      const std::size_t bytes = volume(dims) * bytes_of(tensor.dtype);
      if (batch_ < 1 || !spach_double::is_device_memory(addresses_[tensor.name], bytes)) {
        complain(logger_, "enqueueV3: the address of " + tensor.name + " is no device memory.");
        return false;
      }
    }
    compile();
    spach_double::put(stream, [session = session_, tensors = tensors_, addresses = addresses_,
                               batch = batch_] {
      return session->run(tensors, addresses, batch).empty() ? cudaSuccess : cudaErrorLaunchFailure;
    });
    return true;
  }

 private:
  // What TensorRT for RTX does at the first runs of a batch size: a kernel for it, unless it is in
  // the cache; then, where it is to, a graph, which holds as long as the addresses stay.
  void compile() {
    if (config_ == nullptr) return;
    const std::string batch = std::to_string(batch_);
    const auto strategy = config_->getDynamicShapesKernelSpecializationStrategy();
    const std::string kernel = strategy == Specialization::kNONE ? "fallback" : "batch " + batch;
    if (compiled_.insert(kernel).second) {
      auto* cache = static_cast<RuntimeCache*>(config_->getRuntimeCache());
      const bool found = cache != nullptr && cache->have(kernel);
      trace((found ? "found " : "compiled ") + kernel +
            (strategy == Specialization::kEAGER ? " eagerly" : ""));
      return;
    }
    if (config_->getCudaGraphStrategy() != CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE) return;
    const bool same = graphs_.count(batch_) != 0 && graphs_[batch_] == addresses_;
    graphs_[batch_] = addresses_;
    trace((same ? "launched graph " : "captured graph ") + batch);
  }

  ILogger& logger_;
  std::vector<Tensor> tensors_;
  Plan plan_;
  nvinfer1::IRuntimeConfig* config_;
  std::set<std::string> compiled_;
  std::map<std::int64_t, std::map<std::string, void*>> graphs_;
  std::shared_ptr<Session> session_ = std::make_shared<Session>();
  std::map<std::string, void*> addresses_;
  std::int64_t batch_ = 0;
};

class Engine final : public nvinfer1::ICudaEngine, public nvinfer1::apiv::VCudaEngine {
 public:
  Engine(ILogger& logger, Plan plan, std::vector<Tensor> tensors)
      : logger_(logger), plan_(std::move(plan)), tensors_(std::move(tensors)) {
    mImpl = this;
  }

  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(tensors_.size()); }

  char const* getIOTensorName(int32_t index) const noexcept override {
    return tensors_[static_cast<std::size_t>(index)].name.c_str();
  }

  TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    const Tensor* tensor = find(name);
    return tensor != nullptr ? tensor->mode : TensorIOMode::kNONE;
  }

  DataType getTensorDataType(char const* name) const noexcept override {
    const Tensor* tensor = find(name);
    return tensor != nullptr ? tensor->dtype : DataType::kFLOAT;
  }

  Dims getTensorShape(char const* name) const noexcept override {
    const Tensor* tensor = find(name);
    return tensor != nullptr ? tensor->dims : Dims{-1, {}};
  }

  Dims getProfileShape(char const* name, int32_t,
                       OptProfileSelector select) const noexcept override {
    Dims dims = getTensorShape(name);
    dims.d[0] = plan_.batches[static_cast<int>(select)];
    return dims;
  }

  nvinfer1::IExecutionContext* createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy) noexcept override {
    return createExecutionContextWithRuntimeConfig(nullptr);
  }

  nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override {
    if (spach_double::should_fail("createRuntimeConfig")) return nullptr;
    return new RuntimeConfig(logger_);
  }

  nvinfer1::IExecutionContext* createExecutionContextWithRuntimeConfig(
      nvinfer1::IRuntimeConfig* config) noexcept override {
    if (spach_double::should_fail("createExecutionContext")) {
      complain(logger_, "createExecutionContext: told to fail.");
      return nullptr;
    }
    auto context = std::make_unique<Context>(logger_, tensors_, plan_, config);
    const std::string failed = context->load();
    if (!failed.empty()) complain(logger_, failed);
    return failed.empty() ? context.release() : nullptr;
  }

 private:
  const Tensor* find(const char* name) const {
    for (const Tensor& tensor : tensors_)
      if (tensor.name == name) return &tensor;
    return nullptr;
  }

  ILogger& logger_;
  Plan plan_;
  std::vector<Tensor> tensors_;
};

class Runtime final : public nvinfer1::IRuntime, public nvinfer1::apiv::VRuntime {
 public:
  explicit Runtime(ILogger& logger) : logger_(logger) { mImpl = this; }

  void* getPImpl() noexcept override { return this; }

  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob,
                                               std::size_t size) noexcept override {
    Plan plan;
    if (!read_plan(blob, size, plan)) {
      complain(logger_, "Serialization assertion failed.");
      return nullptr;
    }
    bool is_for_this_gpu = false;
    for (const std::uint32_t gpu : plan.gpus)
      is_for_this_gpu = is_for_this_gpu || static_cast<int>(gpu) == spach_double::gpu();
    if (!is_for_this_gpu) {
      complain(logger_, "Target compute capability not supported on device.");
      return nullptr;
    }
    if (ort::table() == nullptr) {
      complain(logger_, "SPACH_DOUBLE_ORT names no ONNX Runtime.");
      return nullptr;
    }
    Session session;
    const std::string failed = session.load(plan.graph);
    if (!failed.empty()) {
      complain(logger_, failed);
      return nullptr;
    }
    return new Engine(logger_, std::move(plan), session.tensors());
  }

 private:
  ILogger& logger_;
};

}  // namespace

extern "C" int32_t getInferLibVersion() noexcept {
  const char* text = std::getenv("SPACH_DOUBLE_VERSION");
  return text != nullptr ? std::atoi(text) : 10701;
}

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept {
  if (spach_double::should_fail("createInferRuntime")) return nullptr;
  // As TensorRT does: the first logger stays in use, whoever comes later.
  static ILogger* const first = static_cast<ILogger*>(logger);
  return static_cast<nvinfer1::IRuntime*>(new Runtime(*first));
}
