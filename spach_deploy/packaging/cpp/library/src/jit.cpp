#include "jit.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "guard.h"
#include "logger.h"
#include "sha256.h"

namespace spach {
namespace {

void log(Severity severity, const std::string& message) {
  Logger::instance().say(severity, message);
}

}  // namespace

void Jit::save_if_any() noexcept {
  if (!kernels_) return;
  const Status saved = guarded([this] { return save(); });
  if (saved) return;
  const Status logged = guarded([&]() -> Status {
    log(Severity::warning, "The runtime cache was not saved: " + saved.error().message);
    return Done{};
  });
  static_cast<void>(logged);  // without memory there is nobody to tell
}

void Jit::close() noexcept {
  save_if_any();
  kernels_.reset();
  engine_ = nullptr;
}

#if SPACH_RTX

namespace {

Error refused(const char* otherwise) {
  return Error{ErrorCode::engine, Logger::instance().take(otherwise)};
}

using HostMemory = std::unique_ptr<nvinfer1::IHostMemory>;

nvinfer1::DynamicShapesKernelSpecializationStrategy strategy_of(Specialization specialization) {
  using Strategy = nvinfer1::DynamicShapesKernelSpecializationStrategy;
  switch (specialization) {
    case Specialization::lazy: return Strategy::kLAZY;
    case Specialization::eager: return Strategy::kEAGER;
    case Specialization::none: return Strategy::kNONE;
  }
  return Strategy::kLAZY;
}

}  // namespace

Status Jit::open(nvinfer1::ICudaEngine& engine, const EngineOptions& options, RuntimeCacheKey key) {
  engine_ = &engine;
  cuda_graphs_ = options.cuda_graphs;
  specialization_ = options.specialization;
  return options.runtime_cache ? open_cache(options, std::move(key)) : Status(Done{});
}

Status Jit::open_cache(const EngineOptions& options, RuntimeCacheKey key) {
  key_ = std::move(key);
  file_ =
      options.runtime_cache_file.empty() ? default_runtime_cache(key_) : options.runtime_cache_file;
  if (file_.empty()) {
    log(Severity::warning, "There is no runtime cache, because this user has no cache folder.");
    return Done{};
  }
  Result<std::unique_ptr<RuntimeConfig>> config = make_config();
  if (!config) return config.error();
  kernels_.reset((*config)->createRuntimeCache());
  if (!kernels_) {
    log(Severity::warning, Logger::instance().take("TensorRT could not create a runtime cache."));
    file_.clear();
    return Done{};
  }
  const Result<std::optional<Bytes>> found = read_runtime_cache(file_, key_);
  if (!found) {
    log(Severity::warning, "The runtime cache is not used: " + found.error().message);
  } else if (!*found) {
    log(Severity::info, "There is no runtime cache yet: " + text_of(file_));
  } else if (!kernels_->deserialize((*found)->data(), (*found)->size())) {
    log(Severity::warning, "The runtime cache is not used: " + text_of(file_) + ": " +
                               Logger::instance().take("TensorRT refused it."));
  } else {
    contained_ = saved_ = sha256((*found)->data(), (*found)->size());
    log(Severity::info, "The runtime cache was read: " + text_of(file_));
  }
  return Done{};
}

Result<std::unique_ptr<RuntimeConfig>> Jit::make_config() {
  std::unique_ptr<RuntimeConfig> config(engine_->createRuntimeConfig());
  if (!config) return refused("TensorRT could not create a runtime configuration.");
  config->setDynamicShapesKernelSpecializationStrategy(strategy_of(specialization_));
  if (cuda_graphs_ &&
      !config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE))
    return refused("TensorRT refused CUDA graphs.");
  return config;
}

Result<ExecutionContext> Jit::create_context() {
  const std::lock_guard<std::mutex> lock(creating_);
  Result<std::unique_ptr<RuntimeConfig>> config = make_config();
  if (!config) return config.error();
  if (kernels_ && !(*config)->setRuntimeCache(*kernels_))
    log(Severity::warning, Logger::instance().take("TensorRT did not take the runtime cache."));
  ExecutionContext made;
  made.config = std::move(*config);
  made.context.reset(engine_->createExecutionContext(made.config.get()));
  return made;
}

Status Jit::save() {
  if (!kernels_) return Error{ErrorCode::bad_argument, "This engine has no runtime cache."};
  const std::lock_guard<std::mutex> lock(saving_);
  const HostMemory ours(kernels_->serialize());
  if (!ours) return refused("TensorRT could not serialize the runtime cache.");
  const std::string digest = sha256(ours->data(), ours->size());
  if (ours->size() == 0 || digest == saved_) return Done{};
  std::error_code failed;
  if (file_.has_parent_path()) std::filesystem::create_directories(file_.parent_path(), failed);
  std::filesystem::path lock_file = file_;
  lock_file += ".lock";
  const FileLock alone(lock_file);
  if (!alone.is_held())
    return Error{ErrorCode::bad_file, text_of(lock_file) + " cannot be written."};
  Status status = write(*ours, digest);
  if (status) saved_ = digest;
  return status;
}

// What another process wrote since this one read the file stays in it. A file that is of no use is
// replaced.
Status Jit::write(const nvinfer1::IHostMemory& ours, const std::string& digest) {
  const Result<std::optional<Bytes>> found = read_runtime_cache(file_, key_);
  HostMemory both;
  if (found && *found && sha256((*found)->data(), (*found)->size()) != contained_) {
    const std::lock_guard<std::mutex> lock(creating_);
    Result<std::unique_ptr<RuntimeConfig>> config = make_config();
    if (!config) return config.error();
    const std::unique_ptr<Kernels> merged((*config)->createRuntimeCache());
    // What TensorRT refuses, of another driver say, is of no use either.
    if (merged && merged->deserialize((*found)->data(), (*found)->size())) {
      if (merged->deserialize(ours.data(), ours.size())) both.reset(merged->serialize());
      const std::size_t theirs = (*found)->size();
      if (both && both->size() < std::max(theirs, ours.size()))
        both.reset();  // no addition shrinks
      // Whoever reads the larger one adds the rest and writes both.
      if (!both && theirs > ours.size()) return Done{};
    }
  }
  const nvinfer1::IHostMemory& written = both ? *both : ours;
  Status status = write_runtime_cache(file_, key_, written.data(), written.size());
  if (!status) return status;
  if (!both) contained_ = digest;
  log(Severity::info, "The runtime cache was saved: " + text_of(file_));
  return Done{};
}

#else

Status Jit::open(nvinfer1::ICudaEngine& engine, const EngineOptions& options, RuntimeCacheKey) {
  engine_ = &engine;
  if (options.cuda_graphs || options.specialization != Specialization::lazy ||
      !options.runtime_cache_file.empty()) {
    return Error{
        ErrorCode::bad_argument,
        "CUDA graphs, a specialization and a runtime cache are TensorRT for RTX's, and this "
        "program is linked with tensorrt: leave these options out."};
  }
  return Done{};
}

Result<ExecutionContext> Jit::create_context() {
  const std::lock_guard<std::mutex> lock(creating_);
  ExecutionContext made;
  made.context.reset(engine_->createExecutionContext());
  return made;
}

Status Jit::save() {
  return Error{ErrorCode::bad_argument, "This engine has no runtime cache."};
}

#endif

}  // namespace spach
