// The insides of an engine, which its contexts share.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "files.h"
#include "logger.h"
#include "spach/engine.h"

namespace spach {

struct Engine::Impl {
  std::string folder;
  int device = 0;
  ModelFacts facts;
  std::vector<std::string> labels;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::mutex creating;  // TensorRT does not promise that contexts may be created concurrently

  ~Impl();

  Status read(const std::string& from);
  Status deserialize(const Bytes& plan);
  Result<std::unique_ptr<nvinfer1::IExecutionContext>> context();
};

// The shape of a batch of a tensor, as TensorRT wants it.
nvinfer1::Dims dims_of(const TensorFacts& tensor, int batch);

}  // namespace spach
