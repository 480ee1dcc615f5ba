#include "logger.h"

#include <algorithm>
#include <utility>

#include "guard.h"

namespace spach {
namespace {

constexpr std::size_t kMostEntries = 32;
constexpr std::size_t kMostCharacters = 1000;  // of one entry

}  // namespace

Logger& Logger::instance() {
  static Logger* const logger = new Logger();
  return *logger;
}

void Logger::log(nvinfer1::ILogger::Severity severity, const char* message) noexcept {
  if (message == nullptr) return;
  pass_on(static_cast<spach::Severity>(severity), message);
  if (severity > nvinfer1::ILogger::Severity::kERROR) return;
  try {
    std::string text = std::string(message).substr(0, kMostCharacters);
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_back({std::this_thread::get_id(), std::move(text)});
    if (entries_.size() > kMostEntries) entries_.pop_front();
  } catch (...) {
    // No memory for the reason; the failure itself is reported all the same.
  }
}

void Logger::say(spach::Severity severity, const std::string& message) noexcept {
  pass_on(severity, message);
}

// The callback runs without the lock: it may take its time, and set another callback.
void Logger::pass_on(spach::Severity severity, std::string_view message) noexcept {
  if (static_cast<int>(severity) > most_) return;
  try {
    std::shared_ptr<const LogCallback> callback;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      callback = callback_;
    }
    if (callback) (*callback)(severity, message);
  } catch (...) {
    // TensorRT's threads must not see it.
  }
}

void Logger::set_callback(LogCallback callback, spach::Severity most) {
  auto shared = callback ? std::make_shared<const LogCallback>(std::move(callback)) : nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  most_ = shared ? static_cast<int>(most) : -1;
  callback_.swap(shared);
}

const char* name_of(Severity severity) noexcept {
  switch (severity) {
    case Severity::internal_error: return "internal error";
    case Severity::error: return "error";
    case Severity::warning: return "warning";
    case Severity::info: return "info";
    case Severity::verbose: return "verbose";
  }
  return "unknown";
}

Status set_log(LogCallback callback, Severity most) noexcept {
  return guarded([&]() -> Status {
    Logger::instance().set_callback(std::move(callback), most);
    return Done{};
  });
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
