#pragma once

#include <NvInfer.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "spach/log.h"

namespace spach {

// Keeps what TensorRT last said of errors, since its functions only return null or false, and
// passes everything on to the callback that the program set.
//
// There is one for the whole process and it is never destroyed: TensorRT remembers the first logger
// that it was given, and goes on using it for as long as any of its objects lives.
class Logger final : public nvinfer1::ILogger {
 public:
  static Logger& instance();

  void log(nvinfer1::ILogger::Severity severity, const char* message) noexcept override;

  // Words of this library's own, for the callback alone.
  void say(spach::Severity severity, const std::string& message) noexcept;

  void set_callback(LogCallback callback, spach::Severity most);

  // What was said on this thread since it last asked; failing that what threads of TensorRT's own
  // said; failing that `otherwise`.
  std::string take(const std::string& otherwise);

 private:
  struct Entry {
    std::thread::id thread;
    std::string message;
  };

  Logger() = default;

  void pass_on(spach::Severity severity, std::string_view message) noexcept;

  std::mutex mutex_;
  std::deque<Entry> entries_;  // the last few
  std::shared_ptr<const LogCallback> callback_;
  std::atomic<int> most_{-1};  // severity that the callback wants at most; -1: there is none
};

}  // namespace spach
