#pragma once

#include <NvInfer.h>

#include <deque>
#include <mutex>
#include <string>
#include <thread>

namespace spach {

// Keeps what TensorRT last said of errors, since its functions only return null or false.
//
// There is one for the whole process and it is never destroyed: TensorRT remembers the first logger
// that it was given, and goes on using it for as long as any of its objects lives.
class Logger final : public nvinfer1::ILogger {
 public:
  static Logger& instance();

  void log(Severity severity, const char* message) noexcept override;

  // What was said on this thread since it last asked; failing that what threads of TensorRT's own
  // said; failing that `otherwise`.
  std::string take(const std::string& otherwise);

 private:
  struct Entry {
    std::thread::id thread;
    std::string message;
  };

  Logger() = default;

  std::mutex mutex_;
  std::deque<Entry> entries_;  // the last few
};

}  // namespace spach
