#include "files.h"

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#endif

#include <algorithm>
#include <fstream>
#include <system_error>

#include "sha256.h"

namespace spach {

std::filesystem::path path_of(const std::string& text) {
  return std::filesystem::u8path(text);
}

std::string text_of(const std::filesystem::path& path) {
  return path.u8string();
}

Result<Bytes> read_file(const std::filesystem::path& path, std::uint64_t most) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff end = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  if (end < 0) return Error{ErrorCode::bad_file, text_of(path) + " cannot be opened."};
  Bytes content(static_cast<std::size_t>(std::min(static_cast<std::uint64_t>(end), most)));
  file.seekg(0);
  if (!content.empty()) {
    const auto size = static_cast<std::streamsize>(content.size());
    file.read(reinterpret_cast<char*>(content.data()), size);
  }
  if (!file) return Error{ErrorCode::bad_file, text_of(path) + " cannot be read."};
  return content;
}

Status replace_file(const std::filesystem::path& path, std::string_view head, const void* data,
                    std::size_t size) {
  std::filesystem::path written = path;
  written += ".new";
  {
    std::ofstream file(written, std::ios::binary | std::ios::trunc);
    file.write(head.data(), static_cast<std::streamsize>(head.size()));
    file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
    file.close();
    if (!file) {
      std::error_code ignored;
      std::filesystem::remove(written, ignored);
      return Error{ErrorCode::bad_file, text_of(written) + " cannot be written."};
    }
  }
  std::error_code failed;
  std::filesystem::rename(written, path, failed);
  if (!failed) return Done{};
  std::error_code ignored;
  std::filesystem::remove(written, ignored);
  return Error{ErrorCode::bad_file, text_of(path) + " cannot be replaced."};
}

Result<Bytes> read_exported(const std::filesystem::path& path, const FileFacts& facts) {
  return read_file(path, facts.bytes + 1);
}

Status check_file(const std::string& name, const std::byte* data, std::size_t size,
                  const FileFacts& facts) {
  if (size != facts.bytes) {
    const bool is_short = size < facts.bytes;
    return Error{is_short ? ErrorCode::truncated : ErrorCode::changed,
                 name + (is_short ? " has only " + std::to_string(size) : " has more") +
                     (is_short ? " of the " : " than the ") + std::to_string(facts.bytes) +
                     " bytes that were exported."};
  }
  if (sha256(data, size) != facts.sha256) {
    return Error{ErrorCode::changed,
                 name + " was changed: its SHA-256 is not the exported file's."};
  }
  return Done{};
}

#ifdef _WIN32

FileLock::FileLock(const std::filesystem::path& path) noexcept
    : file_(CreateFileW(path.c_str(), GENERIC_READ | GENERIC_WRITE,
                        FILE_SHARE_READ | FILE_SHARE_WRITE, nullptr, OPEN_ALWAYS,
                        FILE_ATTRIBUTE_NORMAL, nullptr)) {
  if (file_ == INVALID_HANDLE_VALUE) return;
  OVERLAPPED from_start{};
  held_ = LockFileEx(file_, LOCKFILE_EXCLUSIVE_LOCK, 0, 1, 0, &from_start) != 0;
}

FileLock::~FileLock() {
  if (file_ == INVALID_HANDLE_VALUE) return;
  OVERLAPPED from_start{};
  if (held_) UnlockFileEx(file_, 0, 1, 0, &from_start);
  CloseHandle(file_);
}

#else

FileLock::FileLock(const std::filesystem::path& path) noexcept
    : file_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
  if (file_ < 0) return;
  int failed = flock(file_, LOCK_EX);
  while (failed != 0 && errno == EINTR) failed = flock(file_, LOCK_EX);
  held_ = failed == 0;
}

FileLock::~FileLock() {
  if (file_ >= 0) close(file_);  // which gives the lock back
}

#endif

}  // namespace spach
