#include "logger.h"

#include <utility>

namespace spach {
namespace {

constexpr std::size_t kMostCharacters = 2000;

}  // namespace

void Logger::log(Severity severity, const char* message) noexcept {
  if (severity > Severity::kERROR || message == nullptr) return;
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (errors_.size() < kMostCharacters)
      errors_.append(errors_.empty() ? "" : " ").append(message);
  } catch (...) {
    // No memory for the reason; the failure itself is reported all the same.
  }
}

std::string Logger::take(const std::string& otherwise) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string errors = std::exchange(errors_, std::string());
  return errors.empty() ? otherwise : errors;
}

}  // namespace spach
