// The file that keeps kernels which TensorRT for RTX compiled: one line of text, then its bytes.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "files.h"
#include "spach/result.h"

namespace spach {

// What compiled kernels are for. None but these very three may use them.
struct RuntimeCacheKey {
  std::string plan_sha256;
  std::string gpu;      // cuda::kind_of
  std::string version;  // of the TensorRT that runs
};

// The file of `key` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache; %LOCALAPPDATA%);
// empty where this user has none.
std::filesystem::path default_runtime_cache(const RuntimeCacheKey& key);

// What `file` holds for `key`; nothing where there is no such file. An error says why a file is of
// no use: damaged, or for another plan, GPU or version.
Result<std::optional<Bytes>> read_runtime_cache(const std::filesystem::path& file,
                                                const RuntimeCacheKey& key);

// Replaces `file`, whose folder must exist, in one step.
Status write_runtime_cache(const std::filesystem::path& file, const RuntimeCacheKey& key,
                           const void* data, std::size_t size);

}  // namespace spach
