// What TensorRT for RTX is told of compiling kernels at run time: one for an engine.
#pragma once

#include <NvInfer.h>

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>

#include "runtime_cache.h"
#include "spach/options.h"
#include "spach/result.h"

namespace spach {

#if SPACH_RTX
using RuntimeConfig = nvinfer1::IRuntimeConfig;
using Kernels = nvinfer1::IRuntimeCache;
#else
struct RuntimeConfig {};  // ordinary TensorRT compiles nothing at run time
struct Kernels {};
#endif

// An execution context and the settings that it was made with, which live as long.
struct ExecutionContext {
  std::unique_ptr<RuntimeConfig> config;
  std::unique_ptr<nvinfer1::IExecutionContext> context;
};

class Jit {
 public:
  Jit() = default;
  ~Jit() { close(); }
  Jit(const Jit&) = delete;
  Jit& operator=(const Jit&) = delete;

  // Begins with an engine, which must outlive this, and reads its runtime cache. A cache that is of
  // no use is a line in the log. Options that ask ordinary TensorRT to compile are an error.
  Status open(nvinfer1::ICudaEngine& engine, const EngineOptions& options, RuntimeCacheKey key);

  // No context, and the reason in the logger, where TensorRT makes none.
  Result<ExecutionContext> create_context();

  // Writes the cache, with what others wrote meanwhile; an error where there is none.
  Status save();

  // Saves, if there is a cache; what goes wrong is a line in the log.
  void save_if_any() noexcept;

  // The same, and ends with the engine. No context may live any more.
  void close() noexcept;

  const std::filesystem::path& file() const noexcept { return file_; }

 private:
  Status open_cache(const EngineOptions& options, RuntimeCacheKey key);
  Result<std::unique_ptr<RuntimeConfig>> make_config();
#if SPACH_RTX
  Status write(const nvinfer1::IHostMemory& ours, const std::string& digest);
#endif

  nvinfer1::ICudaEngine* engine_ = nullptr;
  bool cuda_graphs_ = false;
  Specialization specialization_ = Specialization::lazy;
  RuntimeCacheKey key_;
  std::filesystem::path file_;  // empty: there is no cache
  std::unique_ptr<Kernels> kernels_;
  std::mutex creating_;  // TensorRT does not promise that contexts may be created concurrently
  std::mutex saving_;
  std::string saved_;      // SHA-256 of what was saved last
  std::string contained_;  // of the file's content that our kernels are known to include
};

}  // namespace spach
