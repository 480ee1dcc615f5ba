// The best classes of an image.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "spach/result.h"

namespace spach {

struct Prediction {
  int index = 0;
  float logit = 0;
  float probability = 0;
  std::string label;
};

// The `k` best of `classes` logits, best first, the lower index first among equals. All of them
// where k exceeds classes. `labels` may be empty: then a class is called "class 7".
Result<std::vector<Prediction>> top_k(const float* logits, std::size_t classes, std::size_t k,
                                      const std::vector<std::string>& labels) noexcept;

}  // namespace spach
