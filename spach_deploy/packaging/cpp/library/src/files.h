#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "spach/facts.h"
#include "spach/result.h"

namespace spach {

using Bytes = std::vector<std::byte>;

// A path of UTF-8 text, on Windows too, and the text of a path.
std::filesystem::path path_of(const std::string& text);
std::string text_of(const std::filesystem::path& path);

// A file's first `most` bytes, which is all of it where it has no more: a wrong path costs no
// memory.
Result<Bytes> read_file(const std::filesystem::path& path, std::uint64_t most);

// Replaces a file in one step: who reads it meanwhile gets the old content or the new one.
Status replace_file(const std::filesystem::path& path, std::string_view head, const void* data,
                    std::size_t size);

// An exported file, or one byte more than it should have, by which `check_file` knows.
Result<Bytes> read_exported(const std::filesystem::path& path, const FileFacts& facts);

// Whether `size` bytes at `data` are the file that was exported: `truncated` or `changed` if not.
Status check_file(const std::string& name, const std::byte* data, std::size_t size,
                  const FileFacts& facts);

// Keeps other processes and threads that take the same lock out, for as long as it lives.
class FileLock {
 public:
  // Waits for it. The file is made where there is none, and stays.
  explicit FileLock(const std::filesystem::path& path) noexcept;
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  bool is_held() const noexcept { return held_; }

 private:
#ifdef _WIN32
  void* file_;
#else
  int file_;
#endif
  bool held_ = false;
};

}  // namespace spach
