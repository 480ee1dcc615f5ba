#include "logger.h"

#include <algorithm>
#include <utility>

namespace spach {
namespace {

constexpr std::size_t kMostEntries = 32;
constexpr std::size_t kMostCharacters = 1000;  // of one entry

}  // namespace

Logger& Logger::instance() {
  static Logger* const logger = new Logger();
  return *logger;
}

void Logger::log(Severity severity, const char* message) noexcept {
  if (severity > Severity::kERROR || message == nullptr) return;
  try {
    std::string text = std::string(message).substr(0, kMostCharacters);
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_back({std::this_thread::get_id(), std::move(text)});
    if (entries_.size() > kMostEntries) entries_.pop_front();
  } catch (...) {
    // No memory for the reason; the failure itself is reported all the same.
  }
}

std::string Logger::take(const std::string& otherwise) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto is_mine = [me = std::this_thread::get_id()](const Entry& entry) {
    return entry.thread == me;
  };
  const bool any_mine = std::any_of(entries_.begin(), entries_.end(), is_mine);
  const auto is_taken = [&](const Entry& entry) { return is_mine(entry) || !any_mine; };
  std::string said;
  for (const Entry& entry : entries_)
    if (is_taken(entry)) said.append(said.empty() ? "" : " ").append(entry.message);
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(), is_taken), entries_.end());
  return said.empty() ? otherwise : said;
}

}  // namespace spach
