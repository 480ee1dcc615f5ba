// The border between code that may throw (the standard library does) and callers that must not see
// it.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "spach/result.h"

namespace spach {

// Calls `body`, which returns a Result; an exception becomes its error.
template <typename Body>
auto guarded(Body&& body) noexcept -> decltype(body()) {
  try {
    return std::forward<Body>(body)();
  } catch (const std::bad_alloc&) {
    return Error{ErrorCode::out_of_memory, std::string()};  // a sentence would need memory
  } catch (const std::exception& error) {
    try {
      return Error{ErrorCode::bad_argument, error.what()};
    } catch (...) {
      return Error{ErrorCode::out_of_memory, std::string()};
    }
  } catch (...) {
    return Error{ErrorCode::bad_argument, std::string()};
  }
}

}  // namespace spach
