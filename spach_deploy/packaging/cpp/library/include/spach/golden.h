// The golden pack: a few inputs with the answers of PyTorch in FP32, and the test that uses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "spach/engine.h"
#include "spach/facts.h"
#include "spach/result.h"

namespace spach {

struct GoldenOutput {
  std::vector<float> floats;           // (images, items), for float outputs
  std::vector<std::int64_t> integers;  // (images, items), for int64 outputs
};

struct Golden {
  std::vector<std::string> names;  // one an image
  std::vector<std::byte> input;
  std::vector<GoldenOutput> outputs;  // in the order of ModelFacts::outputs

  std::size_t images() const noexcept { return names.size(); }
};

// Reads golden.bin's bytes. Anything but a pack of this very model is an error.
Result<Golden> parse_golden(const std::byte* bytes, std::size_t size,
                            const ModelFacts& facts) noexcept;

// Reads golden.bin of a model folder and checks its size and SHA-256.
Result<Golden> load_golden(const std::string& folder, const ModelFacts& facts) noexcept;

// One output against the reference, the worst over all images and batch sizes.
struct Comparison {
  std::string output;
  DType dtype = DType::float32;
  bool are_scores = false;  // whether classes were compared
  Tolerance allowed;
  double rel_l2 = 0;
  double max_abs = 0;
  double cosine = 1;
  std::size_t changed = 0;            // images that change class; for int64: ranks that differ
  double changed_margin = 0;          // the reference's largest preference among them
  std::vector<std::string> findings;  // why it did not pass
};

struct SelfTest {
  std::vector<int> batches;  // sizes that were run
  std::size_t images = 0;
  std::vector<Comparison> outputs;

  bool passed() const noexcept;
};

// Runs the golden pack image by image and in the largest batch, and compares every output.
Result<SelfTest> self_test(const Engine& engine) noexcept;
// The same with a pack that is in memory, as for an engine that was loaded from memory.
Result<SelfTest> self_test(const Engine& engine, const Golden& golden) noexcept;

// Compares one run's outputs; what `self_test` is made of.
Result<std::vector<Comparison>> compare(const Golden& golden, const Outputs& outputs,
                                        const ModelFacts& facts) noexcept;

}  // namespace spach
