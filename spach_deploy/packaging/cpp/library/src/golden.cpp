#include "spach/golden.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "files.h"
#include "guard.h"

namespace spach {
namespace {

constexpr char kMagic[8] = {'S', 'P', 'A', 'C', 'H', 'G', 'L', 'D'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kMostImages = 4096;
constexpr std::uint32_t kMostName = 4096;

// Takes what it is asked for from a block of bytes, and never more than there is.
class Reader {
 public:
  Reader(const std::byte* bytes, std::size_t size) : at_(bytes), left_(size) {}

  bool copy(void* destination, std::size_t size) {
    if (size > left_) return false;
    if (size > 0) std::memcpy(destination, at_, size);
    at_ += size;
    left_ -= size;
    return true;
  }

  bool number(std::uint32_t& value) { return copy(&value, sizeof value); }

  bool text(std::string& value, std::uint32_t most) {
    std::uint32_t length = 0;
    if (!number(length) || length > most || length > left_) return false;
    value.resize(length);
    return copy(value.data(), length);
  }

  // `count` values, allocated only if there are so many.
  template <typename T>
  bool values(std::vector<T>& destination, std::size_t count) {
    if (count > left_ / sizeof(T)) return false;
    destination.resize(count);
    return copy(destination.data(), count * sizeof(T));
  }

  bool is_at_end() const { return left_ == 0; }

 private:
  const std::byte* at_;
  std::size_t left_;
};

bool read_names(Reader& reader, std::vector<std::string>& names) {
  std::uint32_t count = 0;
  if (!reader.number(count) || count == 0 || count > kMostImages) return false;
  for (std::uint32_t i = 0; i < count; ++i) {
    names.emplace_back();
    if (!reader.text(names.back(), kMostName)) return false;
  }
  return true;
}

bool read_outputs(Reader& reader, const ModelFacts& facts, Golden& golden) {
  for (const OutputFacts& output : facts.outputs) {
    GoldenOutput answers;
    const std::size_t items = golden.images() * output.tensor.items();
    const bool complete = output.tensor.dtype == DType::int64
                              ? reader.values(answers.integers, items)
                              : reader.values(answers.floats, items);
    if (!complete) return false;
    golden.outputs.push_back(std::move(answers));
  }
  return true;
}

Result<Golden> parse(const std::byte* bytes, std::size_t size, const ModelFacts& facts) {
  const auto malformed = [](const char* what) {
    return Error{ErrorCode::bad_file, std::string("golden.bin ") + what + "."};
  };
  Reader reader(bytes, size);
  char magic[sizeof kMagic];
  std::uint32_t version = 0;
  if (!reader.copy(magic, sizeof magic) || std::memcmp(magic, kMagic, sizeof magic) != 0)
    return malformed("does not begin as a golden pack does");
  if (!reader.number(version) || version != kVersion) return malformed("has another version");
  Golden golden;
  if (!read_names(reader, golden.names)) return malformed("has no readable list of images");
  if (!reader.values(golden.input, golden.images() * facts.input.bytes()))
    return malformed("ends within its inputs");
  if (!read_outputs(reader, facts, golden)) return malformed("ends within its answers");
  if (!reader.is_at_end()) return malformed("goes on after its end");
  for (const GoldenOutput& output : golden.outputs) {
    const auto is_finite = [](float x) { return std::isfinite(x); };
    if (!std::all_of(output.floats.begin(), output.floats.end(), is_finite))
      return malformed("has answers that are not finite");
  }
  return golden;
}

// Comparing

std::string figure(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

// Sums over one image's numbers, in double.
struct Sums {
  double difference = 0, reference = 0, candidate = 0, product = 0, largest = 0;
  bool finite = true;

  Sums(const float* ours, const float* theirs, std::size_t items) {
    for (std::size_t i = 0; i < items; ++i) {
      const double a = ours[i], b = theirs[i], d = b - a;
      difference += d * d;
      reference += a * a;
      candidate += b * b;
      product += a * b;
      largest = std::max(largest, std::abs(d));
      finite = finite && std::isfinite(b);
    }
  }

  double rel_l2() const { return difference == 0 ? 0 : std::sqrt(difference / reference); }

  double cosine() const {
    if (reference == 0 && candidate == 0) return 1;
    const double norms = std::sqrt(reference) * std::sqrt(candidate);
    return norms > 0 ? std::clamp(product / norms, -1.0, 1.0) : 0;
  }
};

// `!(a <= b)` rather than `a > b`: a NaN must not pass.
void judge(Comparison& c) {
  if (!(c.rel_l2 <= c.allowed.rel_l2))
    c.findings.push_back("relative L2 is " + figure(c.rel_l2) + "; " + figure(c.allowed.rel_l2) +
                         " is allowed");
  if (!(c.max_abs <= c.allowed.max_abs))
    c.findings.push_back("the largest error is " + figure(c.max_abs) + "; " +
                         figure(c.allowed.max_abs) + " is allowed");
  if (!(c.cosine >= c.allowed.cosine_min))
    c.findings.push_back("the smallest cosine is below what is required");
  if (!(c.changed_margin <= c.allowed.flip_margin))
    c.findings.push_back("an image changes class although the reference prefers its own by " +
                         figure(c.changed_margin));
}

// Class scores: which images change class, and how sure the reference was.
void compare_classes(Comparison& comparison, const float* ours, const float* theirs,
                     std::size_t items) {
  const float* own = std::max_element(ours, ours + items);
  const float* other = ours + (std::max_element(theirs, theirs + items) - theirs);
  const double margin = static_cast<double>(*own) - static_cast<double>(*other);
  if (!(margin > 0)) return;
  ++comparison.changed;
  comparison.changed_margin = std::max(comparison.changed_margin, margin);
}

Comparison compare_floats(const OutputFacts& facts, const std::vector<float>& reference,
                          const std::vector<float>& candidate, std::size_t images) {
  Comparison result;
  result.allowed = facts.tolerance;
  const std::size_t items = facts.tensor.items();
  result.are_scores = facts.are_scores();
  bool finite = true, silent = true;
  for (std::size_t i = 0; i < images; ++i) {
    const float* ours = reference.data() + i * items;
    const float* theirs = candidate.data() + i * items;
    const Sums sums(ours, theirs, items);
    finite = finite && sums.finite;
    silent = silent && sums.reference == 0;
    if (!sums.finite) continue;
    result.rel_l2 = std::max(result.rel_l2, sums.rel_l2());
    result.max_abs = std::max(result.max_abs, sums.largest);
    result.cosine = std::min(result.cosine, sums.cosine());
    if (result.are_scores) compare_classes(result, ours, theirs, items);
  }
  judge(result);
  if (!finite) result.findings.push_back("it has numbers that are not finite");
  if (silent) result.findings.push_back("the reference is zero everywhere, which proves nothing");
  return result;
}

// How much the reference prefers class `ours` to class `theirs`; infinite where `theirs` is none.
double preference(const float* logits, std::size_t classes, std::int64_t ours,
                  std::int64_t theirs) {
  const auto is_class = [classes](std::int64_t i) {
    return i >= 0 && static_cast<std::uint64_t>(i) < classes;
  };
  if (!is_class(ours) || !is_class(theirs)) return std::numeric_limits<double>::infinity();
  return std::abs(static_cast<double>(logits[ours]) - static_cast<double>(logits[theirs]));
}

// Ranked classes: where they differ, it must be by a tie of the reference's logits.
Comparison compare_ranks(const TensorFacts& tensor, const std::vector<std::int64_t>& reference,
                         const std::vector<std::int64_t>& candidate,
                         const std::vector<float>& logits, const OutputFacts& scores) {
  Comparison result;
  result.allowed = scores.tolerance;
  const std::size_t items = tensor.items(), classes = scores.tensor.items();
  for (std::size_t i = 0; i < reference.size(); ++i) {
    if (candidate[i] == reference[i]) continue;
    ++result.changed;
    const std::size_t row = i / items;
    const auto begin = candidate.begin() + static_cast<std::ptrdiff_t>(row * items);
    const bool repeated =
        std::count(begin, begin + static_cast<std::ptrdiff_t>(items), candidate[i]) > 1;
    const double gap =
        preference(logits.data() + row * classes, classes, reference[i], candidate[i]);
    result.changed_margin =
        std::max(result.changed_margin, repeated ? std::numeric_limits<double>::infinity() : gap);
  }
  if (!(result.changed_margin <= result.allowed.flip_margin))
    result.findings.push_back("classes are ranked differently by more than a tie");
  return result;
}

std::vector<std::int64_t> integers_of(const Output& output) {
  std::vector<std::int64_t> values(output.data.size() / sizeof(std::int64_t));
  if (!values.empty())
    std::memcpy(values.data(), output.data.data(), values.size() * sizeof(std::int64_t));
  return values;
}

Result<std::vector<Comparison>> compare_all(const Golden& golden, const Outputs& outputs,
                                            const ModelFacts& facts) {
  const Error other{ErrorCode::bad_argument, "These are not the outputs of the golden images."};
  if (outputs.size() != facts.outputs.size() || golden.outputs.size() != outputs.size())
    return other;
  const OutputFacts* logits = facts.find(Role::logits);
  std::vector<Comparison> comparisons;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const OutputFacts& expected = facts.outputs[i];
    if (outputs[i].data.size() != golden.images() * expected.tensor.bytes()) return other;
    if (expected.tensor.dtype == DType::int64) {
      if (logits == nullptr) return other;  // parse_facts demands them
      const auto which = static_cast<std::size_t>(logits - facts.outputs.data());
      comparisons.push_back(compare_ranks(expected.tensor, golden.outputs[i].integers,
                                          integers_of(outputs[i]), golden.outputs[which].floats,
                                          *logits));
    } else {
      Result<std::vector<float>> values = outputs[i].floats();
      if (!values) return values.error();
      comparisons.push_back(
          compare_floats(expected, golden.outputs[i].floats, *values, golden.images()));
    }
    comparisons.back().output = expected.tensor.name;
    comparisons.back().dtype = expected.tensor.dtype;
  }
  return comparisons;
}

// The self-test

// The answers to all golden images in batches of `size`; a last one that is too small is filled up.
Result<Outputs> run_golden(Context& context, const Golden& golden, const ModelFacts& facts,
                           int size) {
  Outputs all;
  for (const OutputFacts& output : facts.outputs) all.push_back(Output{output.tensor, {}});
  const std::size_t bytes = facts.input.bytes();
  for (std::size_t start = 0; start < golden.images();) {
    const std::size_t count = std::min(golden.images() - start, static_cast<std::size_t>(size));
    const auto batch = std::max(static_cast<int>(count), facts.batch.min);
    std::vector<std::byte> input(static_cast<std::size_t>(batch) * bytes);
    for (std::size_t i = 0; i < static_cast<std::size_t>(batch); ++i) {
      const std::size_t image = start + std::min(i, count - 1);
      std::memcpy(input.data() + i * bytes, golden.input.data() + image * bytes, bytes);
    }
    Result<Outputs> part = context.run(input.data(), input.size(), batch);
    if (!part) return part.error();
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto begin = (*part)[i].data.begin();
      const std::size_t wanted = count * all[i].tensor.bytes();
      all[i].data.insert(all[i].data.end(), begin, begin + static_cast<std::ptrdiff_t>(wanted));
    }
    start += count;
  }
  return all;
}

// The worse of both, figure by figure.
void merge(Comparison& into, const Comparison& other) {
  into.rel_l2 = std::max(into.rel_l2, other.rel_l2);
  into.max_abs = std::max(into.max_abs, other.max_abs);
  into.cosine = std::min(into.cosine, other.cosine);
  into.changed = std::max(into.changed, other.changed);
  into.changed_margin = std::max(into.changed_margin, other.changed_margin);
  into.findings.insert(into.findings.end(), other.findings.begin(), other.findings.end());
}

Result<SelfTest> test(const Engine& engine, const Golden& golden) {
  const ModelFacts& facts = engine.facts();
  if (golden.images() == 0 || golden.input.size() != golden.images() * facts.input.bytes())
    return Error{ErrorCode::bad_argument, "This is not the golden pack of the engine's model."};
  Result<Context> context = engine.create_context();
  if (!context) return context.error();
  SelfTest report;
  report.images = golden.images();
  const int largest = std::min(static_cast<int>(golden.images()), facts.batch.max);
  report.batches = {facts.batch.min};
  if (largest > facts.batch.min) report.batches.push_back(largest);
  for (const int batch : report.batches) {
    Result<Outputs> outputs = run_golden(*context, golden, facts, batch);
    if (!outputs) return outputs.error();
    Result<std::vector<Comparison>> compared = compare_all(golden, *outputs, facts);
    if (!compared) return compared.error();
    if (report.outputs.empty()) {
      report.outputs = std::move(*compared);
    } else {
      for (std::size_t i = 0; i < compared->size(); ++i) merge(report.outputs[i], (*compared)[i]);
    }
  }
  return report;
}

}  // namespace

Result<Golden> parse_golden(const std::byte* bytes, std::size_t size,
                            const ModelFacts& facts) noexcept {
  return guarded([&]() -> Result<Golden> { return parse(bytes, size, facts); });
}

Result<Golden> load_golden(const std::string& folder, const ModelFacts& facts) noexcept {
  return guarded([&]() -> Result<Golden> {
    Result<Bytes> content = read_exported(path_of(folder) / "golden.bin", facts.golden);
    if (!content) return content.error();
    Status status = check_file("golden.bin", content->data(), content->size(), facts.golden);
    if (!status) return status.error();
    return parse(content->data(), content->size(), facts);
  });
}

bool SelfTest::passed() const noexcept {
  const auto is_fine = [](const Comparison& output) { return output.findings.empty(); };
  return !outputs.empty() && std::all_of(outputs.begin(), outputs.end(), is_fine);
}

Result<std::vector<Comparison>> compare(const Golden& golden, const Outputs& outputs,
                                        const ModelFacts& facts) noexcept {
  return guarded(
      [&]() -> Result<std::vector<Comparison>> { return compare_all(golden, outputs, facts); });
}

Result<SelfTest> self_test(const Engine& engine) noexcept {
  return guarded([&]() -> Result<SelfTest> {
    if (engine.is_from_memory()) {
      return Error{ErrorCode::bad_argument,
                   "The engine was loaded from memory: give its golden pack, as parse_golden reads "
                   "it."};
    }
    Result<Golden> golden = load_golden(engine.folder(), engine.facts());
    if (!golden) return golden.error();
    return test(engine, *golden);
  });
}

Result<SelfTest> self_test(const Engine& engine, const Golden& golden) noexcept {
  return guarded([&]() -> Result<SelfTest> { return test(engine, golden); });
}

}  // namespace spach
