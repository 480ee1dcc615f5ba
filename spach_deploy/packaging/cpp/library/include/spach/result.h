// Errors as values: nothing is thrown across the library's boundary.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace spach {

// Why something did not work. The numbers are part of the C API: append, never reorder.
enum class ErrorCode : int {
  bad_argument = 1,   // the caller's mistake: a null pointer, a batch outside the profile
  bad_file = 2,       // a file that is missing, unreadable or not in its format
  not_a_plan = 3,     // the file does not begin as TensorRT plans do
  truncated = 4,      // shorter than it was written
  changed = 5,        // the size or the SHA-256 is not the one that was exported
  other_flavour = 6,  // TensorRT's plan in a program linked with TensorRT for RTX, or the reverse
  other_version = 7,  // built by another version of TensorRT
  no_gpu = 8,         // no NVIDIA GPU with a working driver
  wrong_gpu = 9,      // built for other GPUs than this one
  out_of_memory = 10,
  cuda = 11,    // the CUDA runtime refused
  engine = 12,  // TensorRT refused, for a reason that is none of the above
  busy = 13,    // the context is in use by another thread
};

// In words, such as "wrong GPU".
const char* name_of(ErrorCode code) noexcept;

struct Error {
  ErrorCode code;
  std::string message;  // a sentence; empty only where there was no memory for one
};

// A value or an error. Look before you take: `if (!result) return result.error();`
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : content_(std::move(value)) {}
  Result(Error error) : content_(std::move(error)) {}

  explicit operator bool() const noexcept { return content_.index() == 0; }

  T& value() noexcept { return *std::get_if<T>(&content_); }
  const T& value() const noexcept { return *std::get_if<T>(&content_); }
  T& operator*() noexcept { return value(); }
  const T& operator*() const noexcept { return value(); }
  T* operator->() noexcept { return &value(); }
  const T* operator->() const noexcept { return &value(); }

  const Error& error() const noexcept { return *std::get_if<Error>(&content_); }

 private:
  std::variant<T, Error> content_;
};

struct Done {};

// Success or an error: `return Done{};`
using Status = Result<Done>;

}  // namespace spach
