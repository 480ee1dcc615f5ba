// The insides of an engine, which its contexts share.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <string>
#include <vector>

#include "files.h"
#include "jit.h"
#include "logger.h"
#include "spach/engine.h"

namespace spach {

struct Engine::Impl {
  std::string folder;
  bool from_memory = false;
  int device = 0;
  int threads = 1;
  ModelFacts facts;
  std::vector<std::string> labels;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  Jit jit;

  ~Impl();

  Status read(std::string_view text, std::string_view label_lines);
  Status load(const std::byte* plan, std::size_t size, const EngineOptions& options);
  Status deserialize(const std::byte* plan, std::size_t size);
  Result<ExecutionContext> context();
};

// The shape of a batch of a tensor, as TensorRT wants it.
nvinfer1::Dims dims_of(const TensorFacts& tensor, int batch);

}  // namespace spach
