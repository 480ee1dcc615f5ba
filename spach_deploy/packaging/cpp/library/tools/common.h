// What the command-line programs share.
#pragma once

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
// after windows.h
#include <shellapi.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

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

// What the program was given, without its name, in UTF-8.
inline std::vector<std::string> arguments(int argc, char** argv) {
#ifdef _WIN32
  static_cast<void>(argv);  // in the code page, which has not every letter
  int count = 0;
  wchar_t** const wide = CommandLineToArgvW(GetCommandLineW(), &count);
  std::vector<std::string> given;
  for (int i = 1; i < count && i < argc; ++i)
    given.push_back(std::filesystem::path(wide[i]).u8string());
  LocalFree(wide);
  return given;
#else
  return std::vector<std::string>(argv + (argc > 0 ? 1 : 0), argv + argc);
#endif
}

inline std::filesystem::path path_of(const std::string& text) {
  return std::filesystem::u8path(text);
}

// A whole number from 1 to `most`, or 0.
inline int positive(const std::string& text, long most) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  return !text.empty() && *end == '\0' && value >= 1 && value <= most ? static_cast<int>(value) : 0;
}

}  // namespace tools
