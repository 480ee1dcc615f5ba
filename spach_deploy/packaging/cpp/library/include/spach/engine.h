// Load a model folder once, run it from as many threads as you like, each with a context of its
// own.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "spach/facts.h"
#include "spach/options.h"
#include "spach/preprocess.h"
#include "spach/ranking.h"
#include "spach/result.h"

struct CUstream_st;  // what cudaStream_t points to; NVIDIA's headers are not needed to use this one

namespace spach {

// An output of a batch, in host memory.
struct Output {
  TensorFacts tensor;
  std::vector<std::byte> data;  // batch * tensor.bytes()

  // Numbers as float, whatever the dtype is.
  Result<std::vector<float>> floats() const noexcept;
};

using Outputs = std::vector<Output>;  // in the order of ModelFacts::outputs

// An output of a batch where the GPU wrote it: pinned host memory of a context.
struct OutputView {
  TensorFacts tensor;
  const void* data = nullptr;
  std::size_t bytes = 0;  // batch * tensor.bytes()
};

// An execution context with its buffers and its stream: for one thread at a time. A second thread
// that uses it at the same moment gets an error, `busy`. It keeps the engine alive.
class Context {
 public:
  Context(Context&&) noexcept;
  Context& operator=(Context&&) noexcept;
  ~Context();

  // Runs one batch from and to host memory, and waits. `input` holds batch * input.bytes().
  // The batch must be within the profile.
  Result<Outputs> run(const void* input, std::size_t input_bytes, int batch) noexcept;

  // Puts one batch on `stream` and does not wait. `device_input` and `device_outputs` (in the order
  // of ModelFacts::outputs) are device memory of the caller, valid until the stream has passed;
  // until then the context is to be used on that stream only.
  Status enqueue(const void* device_input, int batch, void* const* device_outputs,
                 std::size_t output_count, CUstream_st* stream) noexcept;

  // Batches in flight, without a copy in host memory. A slot is pinned memory for the largest batch
  // and its outputs, made when it is first named. Write a batch to `input`, `submit` it, do
  // something else (such as writing the next batch to another slot), `wait` for it:
  //
  //   spach::Result<void*> to = context->input(0);
  //   context->preprocess(images, count, *to);
  //   context->submit(0, count);
  //   spach::Result<std::vector<spach::OutputView>> views = context->wait(0);
  //
  // Batches run in the order of `submit`. A slot's input must not change until `wait` has returned;
  // its outputs are those of the last `wait` until it is submitted again. Both pointers stay the
  // same for as long as the context lives.
  static constexpr std::size_t kSlots = 16;
  Result<void*> input(std::size_t slot) noexcept;
  Status submit(std::size_t slot, int batch) noexcept;
  Result<std::vector<OutputView>> wait(std::size_t slot) noexcept;

  // Writes the model's inputs of `count` pictures to `destination`, on EngineOptions::threads.
  Status preprocess(const Image* images, std::size_t count, void* destination) noexcept;

  // Runs each of `batches` twice, of zeros; the profile's smallest, usual and largest where there
  // are none. The engine then has compiled what these sizes need, has captured them where CUDA
  // graphs are on and `specialization` is not lazy, and its runtime cache is saved.
  Status warm_up(const std::vector<int>& batches = {}) noexcept;

  // Preprocesses, runs and ranks any number of images, in batches that the profile allows.
  // A last batch that is too small is filled up with its last image, whose answers are dropped.
  Result<std::vector<std::vector<Prediction>>> classify(const Image* images, std::size_t count,
                                                        std::size_t k) noexcept;

  // Logits (count, classes) of inputs in host memory, any number, batched as `classify` does.
  Result<std::vector<float>> logits(const void* input, std::size_t count) noexcept;

  // One output (count, items), such as an embedding, by its name: of inputs in host memory, or of
  // pictures, any number, batched as `classify` does.
  Result<std::vector<float>> output(const std::string& name, const void* input,
                                    std::size_t count) noexcept;
  Result<std::vector<float>> output(const std::string& name, const Image* images,
                                    std::size_t count) noexcept;

 private:
  friend class Engine;
  struct Impl;
  explicit Context(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

// A loaded plan. Copies share it; every member may be called from several threads at once.
class Engine {
 public:
  // Loads `folder` (engine.plan, model.txt, labels.txt) for CUDA device `device`. The plan's size,
  // SHA-256, beginning, flavour and version are checked before TensorRT sees it.
  // `folder` is UTF-8, on Windows too.
  static Result<Engine> load(const std::string& folder, int device = 0) noexcept;
  static Result<Engine> load(const std::filesystem::path& folder,
                             const EngineOptions& options) noexcept;
  // The same checks on files that are in memory already.
  static Result<Engine> load(const ModelBytes& model, const EngineOptions& options = {}) noexcept;

  const ModelFacts& facts() const noexcept;
  const std::vector<std::string>& labels() const noexcept;  // empty, or one a class
  const std::string& folder() const noexcept;               // in UTF-8
  bool is_from_memory() const noexcept;

  Result<Context> create_context() const noexcept;

  // Where the runtime cache is kept; empty where there is none.
  const std::filesystem::path& runtime_cache_file() const noexcept;
  // Writes what was compiled until now, together with what other processes have written meanwhile.
  Status save_runtime_cache() const noexcept;

  struct Impl;

  Engine(const Engine&) noexcept = default;  // and so moving copies: there is no empty engine
  Engine& operator=(const Engine&) noexcept = default;

 private:
  explicit Engine(std::shared_ptr<Impl> impl) noexcept;
  std::shared_ptr<Impl> impl_;
};

// The TensorRT that this program is linked with: "tensorrt" or "tensorrt-rtx", and "10.13.2".
const char* linked_flavour() noexcept;
std::string linked_version();

}  // namespace spach
