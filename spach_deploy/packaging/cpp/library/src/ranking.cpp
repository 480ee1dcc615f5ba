#include "spach/ranking.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "guard.h"

namespace spach {
namespace {

std::string label_of(std::size_t index, const std::vector<std::string>& labels) {
  return index < labels.size() ? labels[index] : "class " + std::to_string(index);
}

}  // namespace

Result<std::vector<Prediction>> top_k(const float* logits, std::size_t classes, std::size_t k,
                                      const std::vector<std::string>& labels) noexcept {
  return guarded([&]() -> Result<std::vector<Prediction>> {
    if (logits == nullptr || classes == 0 || k == 0)
      return Error{ErrorCode::bad_argument, "There is nothing to rank."};
    if (!std::all_of(logits, logits + classes, [](float x) { return std::isfinite(x); }))
      return Error{ErrorCode::engine, "The logits hold numbers that are not finite."};
    std::vector<std::size_t> order(classes);
    std::iota(order.begin(), order.end(), std::size_t{0});
    const std::size_t kept = std::min(k, classes);
    const auto before = [logits](std::size_t a, std::size_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                      before);
    const double best = logits[order.front()];
    double sum = 0;
    for (std::size_t i = 0; i < classes; ++i) sum += std::exp(logits[i] - best);
    std::vector<Prediction> predictions;
    for (std::size_t rank = 0; rank < kept; ++rank) {
      const std::size_t index = order[rank];
      const double probability = std::exp(logits[index] - best) / sum;
      predictions.push_back({static_cast<int>(index), logits[index],
                             static_cast<float>(probability), label_of(index, labels)});
    }
    return predictions;
  });
}

}  // namespace spach
