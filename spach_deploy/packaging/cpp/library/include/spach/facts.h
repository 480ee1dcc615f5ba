// What a model folder says of its model: the content of model.txt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "spach/result.h"

namespace spach {

enum class DType { float32, float16, uint8, int64 };

// How pictures are resized; bicubic and bilinear with antialiasing.
enum class Interpolation { bicubic, bilinear, nearest };

std::size_t size_of(DType dtype) noexcept;
const char* name_of(DType dtype) noexcept;

// A graph input or output. `shape` is one image's: the leading batch is left out.
struct TensorFacts {
  std::string name;
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;

  std::size_t items() const noexcept;  // of one image
  std::size_t bytes() const noexcept;  // of one image
};

// How far an output may be from the reference. As spach-validate judges, image by image.
struct Tolerance {
  double rel_l2 = 0;
  double max_abs = 0;      // infinite where it is not bounded
  double cosine_min = -1;  // -1 where it is not bounded
  double flip_margin = 0;  // a class may change where the reference preferred its own by this much
};

// What an output means. The last three follow from the logits.
enum class Role { other, logits, embedding, features, probabilities, top_values, top_indices };

const char* name_of(Role role) noexcept;

struct OutputFacts {
  TensorFacts tensor;
  Tolerance tolerance;  // of no meaning for int64
  Role role = Role::other;

  // Whether it has a number for each class.
  bool are_scores() const noexcept { return role == Role::logits || role == Role::probabilities; }
};

struct FileFacts {
  std::uint64_t bytes = 0;
  std::string sha256;  // 64 hexadecimal digits
};

struct BatchFacts {
  int min = 1;
  int opt = 1;
  int max = 1;
};

struct ModelFacts {
  std::string name;
  std::string precision;
  std::string flavour;              // "tensorrt" or "tensorrt-rtx"
  std::string version;              // of the TensorRT that built the plan
  bool version_compatible = false;  // later versions may load it too
  std::vector<int> gpus;            // compute capabilities as 10 * major + minor; empty: not known
  BatchFacts batch;
  TensorFacts input;
  std::vector<OutputFacts> outputs;
  int image_height = 0;
  int image_width = 0;
  int resize_height = 0;  // a resized picture just covers this
  int resize_width = 0;
  Interpolation interpolation = Interpolation::bicubic;
  int pillow = 0;  // major version of the Pillow whose pixels the model was validated with
  std::vector<double> mean;  // of each channel
  std::vector<double> stddev;
  FileFacts plan;
  FileFacts golden;

  // The first output of a role, or of a name; a null pointer where there is none.
  const OutputFacts* find(Role role) const noexcept;
  const OutputFacts* find(const std::string& called) const noexcept;
  int classes() const noexcept;  // 0 for a model without logits
  int channels() const noexcept { return static_cast<int>(mean.size()); }
  bool takes_pixels() const noexcept { return input.dtype == DType::uint8; }
};

// Reads model.txt's text. Every entry is checked, so that later code may trust the numbers.
Result<ModelFacts> parse_facts(std::string_view text) noexcept;

}  // namespace spach
