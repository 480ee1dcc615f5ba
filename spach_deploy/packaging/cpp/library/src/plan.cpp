#include "plan.h"

#include <charconv>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "files.h"

namespace spach {
namespace {

constexpr std::size_t kHeaderBytes = 64;
constexpr std::size_t kSizeAt = 16;  // of TensorRT for RTX, which writes the plan's size there

// The flavour that a plan's first four bytes tell. Not documented by NVIDIA: seen in plans of
// TensorRT for RTX ("vtrt"), reported of TensorRT's ("ftrt", "ptrt").
const char* flavour_of(const std::byte* plan, std::size_t size) {
  if (size < 4) return nullptr;
  if (std::memcmp(plan, "vtrt", 4) == 0) return "tensorrt-rtx";
  if (std::memcmp(plan, "ftrt", 4) == 0 || std::memcmp(plan, "ptrt", 4) == 0) return "tensorrt";
  return nullptr;
}

// The size that the plan itself declares, where it is known to declare one.
Status check_declared(const std::byte* plan, std::size_t size, const std::string& flavour) {
  if (size < kHeaderBytes) {
    return Error{ErrorCode::truncated,
                 "engine.plan ends after " + std::to_string(size) + " bytes."};
  }
  if (flavour != "tensorrt-rtx") return Done{};
  std::uint64_t declared = 0;
  std::memcpy(&declared, plan + kSizeAt, sizeof declared);
  if (declared == size) return Done{};
  return Error{declared > size ? ErrorCode::truncated : ErrorCode::changed,
               "engine.plan has " + std::to_string(size) + " bytes, and its header declares " +
                   std::to_string(declared) + "."};
}

// "10.13.2.6" -> 10, 13, 2. False where the text does not begin with a number.
bool parse_version(const std::string& text, int (&version)[3]) {
  const char* at = text.data();
  const char* const end = at + text.size();
  for (int i = 0; i < 3; ++i) {
    const auto [next, error] = std::from_chars(at, end, version[i]);
    if (error != std::errc()) return i > 0;
    at = next;
    if (at == end || *at != '.') return true;
    ++at;
  }
  return true;
}

bool may_load(const int (&plan)[3], const int (&library)[3], bool version_compatible) {
  const auto ordered = [](const int (&v)[3]) { return std::make_tuple(v[0], v[1], v[2]); };
  return version_compatible ? ordered(library) >= ordered(plan) : ordered(library) == ordered(plan);
}

}  // namespace

std::string dotted(const int (&version)[3]) {
  return std::to_string(version[0]) + "." + std::to_string(version[1]) + "." +
         std::to_string(version[2]);
}

Status check_plan(const std::byte* plan, std::size_t size, const ModelFacts& facts,
                  const Library& library) {
  if (size == 0) return Error{ErrorCode::truncated, "engine.plan is empty."};
  const char* flavour = flavour_of(plan, size);
  if (flavour == nullptr)
    return Error{ErrorCode::not_a_plan, "engine.plan does not begin as TensorRT plans do."};
  if (Status status = check_file("engine.plan", plan, size, facts.plan); !status) return status;
  if (Status status = check_declared(plan, size, flavour); !status) return status;
  if (library.flavour != flavour || library.flavour != facts.flavour) {
    return Error{ErrorCode::other_flavour, "engine.plan was built by " + std::string(flavour) +
                                               ", and this program is linked with " +
                                               library.flavour + "."};
  }
  int built[3] = {0, 0, 0};
  const bool is_known = parse_version(facts.version, built);
  if (is_known && !may_load(built, library.version, facts.version_compatible)) {
    return Error{ErrorCode::other_version,
                 "engine.plan was built by " + facts.flavour + " " + dotted(built) +
                     ", and this program runs with " + dotted(library.version) +
                     ". A plan needs the version that built it" +
                     (facts.version_compatible ? " or a later one." : ".")};
  }
  return Done{};
}

}  // namespace spach
