// Everything that reads bytes from outside, as one fuzz target. The first byte of an input chooses
// what the rest is: a plan, a golden pack, a model text, a picture's pixels.
//
//   fuzz LIST                              every file of a list, one path a line; counts
//   clang++ -DWITH_LIBFUZZER -fsanitize=fuzzer,...   libFuzzer's own main
//
// $SPACH_FUZZ_MODEL is the folder of a good model. Its facts are bent to fit each input, so that a
// wrong size or hash does not end every plan at the door.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "plan.h"
#include "sha256.h"
#include "spach/spach.h"

namespace {

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), {});
}

spach::ModelFacts good_facts() {
  const char* folder = std::getenv("SPACH_FUZZ_MODEL");
  const auto facts =
      spach::parse_facts(read(std::string(folder ? folder : "model") + "/model.txt"));
  if (!facts) std::abort();
  return *facts;
}

// As spach_deploy wrote it, and as a file that nobody exported.
spach::Status plan(const std::byte* data, std::size_t size, const spach::ModelFacts& good) {
  const spach::Library library{"tensorrt-rtx", {1, 7, 1}};
  if (spach::check_plan(data, size, good, library)) return spach::Done{};
  spach::ModelFacts bent = good;
  bent.plan = {size, spach::sha256(data, size)};
  return spach::check_plan(data, size, bent, library);
}

spach::Status golden(const std::byte* data, std::size_t size, const spach::ModelFacts& good) {
  const auto pack = spach::parse_golden(data, size, good);
  if (!pack) return pack.error();
  // A pack that was taken is used: its own answers must be found equal to themselves, or refused.
  spach::Outputs outputs;
  for (std::size_t i = 0; i < good.outputs.size(); ++i) {
    const spach::TensorFacts& tensor = good.outputs[i].tensor;
    spach::Output output{tensor, std::vector<std::byte>(pack->images() * tensor.bytes())};
    const spach::GoldenOutput& answers = pack->outputs[i];
    if (tensor.dtype == spach::DType::float32 && !output.data.empty())
      std::memcpy(output.data.data(), answers.floats.data(), output.data.size());
    if (tensor.dtype == spach::DType::int64 && !output.data.empty())
      std::memcpy(output.data.data(), answers.integers.data(), output.data.size());
    outputs.push_back(std::move(output));
  }
  const auto compared = spach::compare(*pack, outputs, good);
  if (!compared) return compared.error();
  return spach::Done{};
}

spach::Status facts(const std::byte* data, std::size_t size) {
  const auto parsed = spach::parse_facts({reinterpret_cast<const char*>(data), size});
  if (!parsed) return parsed.error();
  return spach::Done{};
}

// Two bytes of width, two of height, one of padding a row, then pixels.
spach::Status picture(const std::byte* data, std::size_t size, const spach::ModelFacts& good) {
  std::uint16_t extent[2] = {};
  if (size < 5) return spach::Error{spach::ErrorCode::bad_argument, "too short"};
  std::memcpy(extent, data, 4);
  const std::size_t stride = 3 * std::size_t{extent[0]} + std::to_integer<std::size_t>(data[4]);
  const std::vector<std::byte> pixels(data + 5, data + size);
  if (stride * extent[1] > pixels.size())
    return spach::Error{spach::ErrorCode::bad_argument, "too short"};
  const auto* rgb = reinterpret_cast<const std::uint8_t*>(pixels.data());
  std::vector<std::byte> input(good.input.bytes());
  return spach::Preprocessor(good).write({rgb, extent[0], extent[1], stride}, input.data());
}

spach::Status one(const std::byte* data, std::size_t size) {
  static const spach::ModelFacts good = good_facts();
  if (size == 0) return spach::Error{spach::ErrorCode::bad_argument, "empty"};
  switch (std::to_integer<int>(*data)) {
    case 'p': return plan(data + 1, size - 1, good);
    case 'g': return golden(data + 1, size - 1, good);
    case 'm': return facts(data + 1, size - 1);
    case 'i': return picture(data + 1, size - 1, good);
    default: return spach::Error{spach::ErrorCode::bad_argument, "of no kind"};
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const spach::Status status = one(reinterpret_cast<const std::byte*>(data), size);
  if (!status && status.error().message.empty()) std::abort();  // an error without a reason
  return 0;
}

#ifndef WITH_LIBFUZZER
int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::ifstream names(argv[1]);
  int total = 0, taken = 0, silent = 0;
  for (std::string path; std::getline(names, path); ++total) {
    const std::string content = read(path);
    // A copy of its very size, so that AddressSanitizer sees a read past the end.
    const std::vector<char> exact(content.begin(), content.end());
    const spach::Status status =
        one(reinterpret_cast<const std::byte*>(exact.data()), exact.size());
    taken += status ? 1 : 0;
    silent += !status && status.error().message.empty() ? 1 : 0;
  }
  std::printf("%d files, %d taken, %d without a reason\n", total, taken, silent);
  return 0;
}
#endif
