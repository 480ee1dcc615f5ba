// What the command-line programs share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "spach/spach.h"

namespace tools {

// 1: a file is not the exported one; 2: bad usage or input; 3: this machine cannot do it.
inline int exit_code(spach::ErrorCode code) {
  switch (code) {
    case spach::ErrorCode::truncated:
    case spach::ErrorCode::changed:
    case spach::ErrorCode::not_a_plan: return 1;
    case spach::ErrorCode::bad_argument:
    case spach::ErrorCode::bad_file: return 2;
    default: return 3;
  }
}

inline int fail(const spach::Error& error) {
  std::fprintf(stderr, "Error: %s. %s\n", spach::name_of(error.code), error.message.c_str());
  return exit_code(error.code);
}

inline int usage(const char* text) {
  std::fprintf(stderr, "Usage: %s\n", text);
  return 2;
}

// A whole number from 1 to `most`, or 0.
inline int positive(const char* text, long most) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  return end != text && *end == '\0' && value >= 1 && value <= most ? static_cast<int>(value) : 0;
}

}  // namespace tools
