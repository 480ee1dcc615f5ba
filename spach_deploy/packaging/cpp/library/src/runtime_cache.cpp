#include "runtime_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "sha256.h"

namespace spach {
namespace {

constexpr const char* kCacheMagic = "spach-runtime-cache 1";
constexpr std::uint64_t kMostCacheBytes = std::uint64_t{1} << 32;
constexpr std::size_t kMostCacheHead = 512;

// The first line: what follows it, and for what.
std::string head_of(const RuntimeCacheKey& key, const void* data, std::size_t size) {
  return std::string(kCacheMagic) + " plan " + key.plan_sha256 + " gpu " + key.gpu + " version " +
         key.version + " bytes " + std::to_string(size) + " sha256 " + sha256(data, size) + "\n";
}

#ifdef _WIN32
std::filesystem::path user_cache_folder() {
  const wchar_t* local = _wgetenv(L"LOCALAPPDATA");
  return local != nullptr ? std::filesystem::path(local) : std::filesystem::path();
}
#else
std::filesystem::path user_cache_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && cache[0] == '/') return cache;  // a relative one is to be ignored
  const char* home = std::getenv("HOME");
  if (home == nullptr || home[0] == '\0') return {};
  return std::filesystem::path(home) / ".cache";
}
#endif

}  // namespace

std::filesystem::path default_runtime_cache(const RuntimeCacheKey& key) {
  const std::filesystem::path folder = user_cache_folder();
  if (folder.empty()) return {};
  const std::string name =
      key.plan_sha256.substr(0, 16) + "-" + key.gpu + "-" + key.version + ".cache";
  return folder / "spach" / path_of(name);
}

Result<std::optional<Bytes>> read_runtime_cache(const std::filesystem::path& file,
                                                const RuntimeCacheKey& key) {
  std::error_code unknown;
  if (!std::filesystem::exists(file, unknown)) return std::optional<Bytes>();
  Result<Bytes> content = read_file(file, kMostCacheBytes);
  if (!content) return content.error();
  const auto useless = [&file](const char* why) {
    return Error{ErrorCode::bad_file, text_of(file) + " " + why};
  };
  const auto begin = content->begin();
  const auto searched =
      begin + static_cast<std::ptrdiff_t>(std::min(content->size(), kMostCacheHead));
  const auto end = std::find(begin, searched, std::byte{'\n'});
  if (end == searched || content->size() < std::strlen(kCacheMagic) ||
      std::memcmp(content->data(), kCacheMagic, std::strlen(kCacheMagic)) != 0)
    return useless("is no runtime cache.");
  const std::string head(reinterpret_cast<const char*>(content->data()),
                         static_cast<std::size_t>(end - begin) + 1);
  Bytes data(end + 1, content->end());
  if (head == head_of(key, data.data(), data.size())) return std::optional<Bytes>(std::move(data));
  const std::string wanted = head_of(key, nullptr, 0);
  const std::size_t same = wanted.find(" bytes ");
  return useless(head.compare(0, same, wanted, 0, same) == 0
                     ? "is damaged."
                     : "was written for another plan, GPU or version of TensorRT.");
}

Status write_runtime_cache(const std::filesystem::path& file, const RuntimeCacheKey& key,
                           const void* data, std::size_t size) {
  return replace_file(file, head_of(key, data, size), data, size);
}

}  // namespace spach
