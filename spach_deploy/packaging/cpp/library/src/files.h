#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "spach/facts.h"
#include "spach/result.h"

namespace spach {

using Bytes = std::vector<std::byte>;

// A file's first `most` bytes, which is all of it where it has no more: a wrong path costs no
// memory.
Result<Bytes> read_file(const std::string& path, std::uint64_t most);

// An exported file, or one byte more than it should have, by which `check_file` knows.
Result<Bytes> read_exported(const std::string& path, const FileFacts& facts);

// Whether `size` bytes at `data` are the file that was exported: `truncated` or `changed` if not.
Status check_file(const std::string& name, const std::byte* data, std::size_t size,
                  const FileFacts& facts);

std::string join(const std::string& folder, const char* name);

}  // namespace spach
