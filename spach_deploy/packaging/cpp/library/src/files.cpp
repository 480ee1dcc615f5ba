#include "files.h"

#include <algorithm>
#include <fstream>

#include "sha256.h"

namespace spach {

Result<Bytes> read_file(const std::string& path, std::uint64_t most) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff end = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  if (end < 0) return Error{ErrorCode::bad_file, path + " cannot be opened."};
  Bytes content(static_cast<std::size_t>(std::min(static_cast<std::uint64_t>(end), most)));
  file.seekg(0);
  if (!content.empty()) {
    const auto size = static_cast<std::streamsize>(content.size());
    file.read(reinterpret_cast<char*>(content.data()), size);
  }
  if (!file) return Error{ErrorCode::bad_file, path + " cannot be read."};
  return content;
}

Result<Bytes> read_exported(const std::string& path, const FileFacts& facts) {
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

std::string join(const std::string& folder, const char* name) {
  return folder.empty() ? std::string(name) : folder + "/" + name;
}

}  // namespace spach
