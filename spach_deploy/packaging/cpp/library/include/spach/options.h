// How an engine is loaded and run, beside what the plan itself says.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace spach {

// When TensorRT for RTX compiles kernels for a batch size that it meets: in the background, with
// slower ones until then; at once, which makes the first run of each size wait; or never.
enum class Specialization : int { lazy, eager, none };

struct EngineOptions {
  int device = 0;  // CUDA device

  // TensorRT for RTX compiles kernels in every process anew, unless it finds them in this file. It
  // is read when the engine is loaded, and written by `Engine::save_runtime_cache`, by
  // `Context::warm_up`, and when the engine and its contexts are gone. Empty: a file for this plan,
  // GPU and version in the user's cache folder. It holds code for the GPU: take no one else's.
  bool runtime_cache = true;
  std::filesystem::path runtime_cache_file;

  // TensorRT for RTX launches all kernels of a batch size at once, once it has run in this context
  // (after its specialization, where that is lazy).
  bool cuda_graphs = false;

  Specialization specialization = Specialization::lazy;

  int threads = 1;  // that preprocess the pictures of a batch
};

// A model folder's files in memory. Only read while the engine is loaded.
struct ModelBytes {
  std::string_view text;  // model.txt
  const void* plan = nullptr;
  std::size_t plan_bytes = 0;
  std::string_view labels;  // labels.txt; may be empty
};

}  // namespace spach
