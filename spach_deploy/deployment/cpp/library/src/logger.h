#pragma once

#include <NvInfer.h>

#include <mutex>
#include <string>

namespace spach {

// Keeps what TensorRT last said of an error, since its functions only return null or false.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;

  // The last errors, oldest first, and forgets them. `otherwise` where there are none.
  std::string take(const std::string& otherwise);

 private:
  std::mutex mutex_;  // TensorRT logs from threads of its own too
  std::string errors_;
};

}  // namespace spach
