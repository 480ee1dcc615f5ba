#include "spach/facts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <locale>
#include <set>
#include <sstream>

#include "guard.h"

namespace spach {
namespace {

// Far above any model of this family, far below what could overflow a product of two of them.
constexpr std::int64_t kMostItems = std::int64_t{1} << 28;
constexpr int kMostBatch = 1 << 16;
constexpr int kMostSide = 1 << 14;
constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 40;
constexpr std::size_t kMostOutputs = 16;
constexpr std::size_t kMostChannels = 4096;

// The words of one line, taken one after another. A word that is missing or not what was asked for
// makes the whole line bad, which is looked at once, at its end.
class Line {
 public:
  explicit Line(const std::string& text) : words_(text) { words_.imbue(std::locale::classic()); }

  std::string word() {
    std::string text;
    good_ = static_cast<bool>(words_ >> text) && good_;
    return text;
  }

  // An integer from `least` to `most`.
  std::int64_t integer(std::int64_t least, std::int64_t most) {
    std::int64_t value = least;
    good_ = static_cast<bool>(words_ >> value) && value >= least && value <= most && good_;
    return good_ ? value : least;
  }

  int small(int least, int most) { return static_cast<int>(integer(least, most)); }

  // A finite number.
  double number() {
    double value = 0;
    good_ = static_cast<bool>(words_ >> value) && std::isfinite(value) && good_;
    return good_ ? value : 0;
  }

  // A finite number, or the word "any" for `unbounded`.
  double bound(double unbounded) {
    const auto start = words_.tellg();
    if (word() == "any") return unbounded;
    words_.clear();
    words_.seekg(start);
    return number();
  }

  bool more() {
    words_ >> std::ws;
    return !words_.eof();
  }

  void refuse() { good_ = false; }

  bool ended_well() { return good_ && !more(); }

 private:
  std::istringstream words_;
  bool good_ = true;
};

DType read_dtype(Line& line) {
  const std::string text = line.word();
  for (const DType dtype : {DType::float32, DType::float16, DType::uint8, DType::int64})
    if (text == name_of(dtype)) return dtype;
  line.refuse();
  return DType::float32;
}

constexpr Role kRoles[] = {Role::other,         Role::logits,     Role::embedding,  Role::features,
                           Role::probabilities, Role::top_values, Role::top_indices};

Role role_named(const std::string& text, Role otherwise) {
  for (const Role role : kRoles)
    if (text == name_of(role)) return role;
  return otherwise;
}

// The role at the end of an output's line; without one, the output's name says it.
Role read_role(Line& line, const std::string& name) {
  if (!line.more()) return role_named(name, Role::other);
  const std::string text = line.word();
  const Role role = role_named(text, Role::other);
  if (text != name_of(role)) line.refuse();
  return role;
}

TensorFacts read_tensor(Line& line) {
  TensorFacts tensor;
  tensor.name = line.word();
  tensor.dtype = read_dtype(line);
  const int extents = line.small(1, 4);
  std::int64_t items = 1;
  for (int i = 0; i < extents; ++i) {
    tensor.shape.push_back(line.integer(1, kMostItems));
    items *= tensor.shape.back();
    if (items > kMostItems) line.refuse(), items = 1;
  }
  return tensor;
}

Tolerance read_tolerance(Line& line) {
  Tolerance tolerance;
  tolerance.rel_l2 = line.number();
  tolerance.max_abs = line.bound(std::numeric_limits<double>::infinity());
  tolerance.cosine_min = line.bound(-1);
  tolerance.flip_margin = line.number();
  if (tolerance.rel_l2 < 0 || tolerance.max_abs < 0 || tolerance.flip_margin < 0) line.refuse();
  return tolerance;
}

FileFacts read_file_facts(Line& line) {
  FileFacts file;
  file.bytes = static_cast<std::uint64_t>(line.integer(1, static_cast<std::int64_t>(kMostBytes)));
  file.sha256 = line.word();
  const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (file.sha256.size() != 64 || !std::all_of(file.sha256.begin(), file.sha256.end(), is_digit))
    line.refuse();
  return file;
}

BatchFacts read_batch(Line& line) {
  BatchFacts batch;
  batch.min = line.small(1, kMostBatch);
  batch.opt = line.small(batch.min, kMostBatch);
  batch.max = line.small(batch.opt, kMostBatch);
  return batch;
}

// A number for each channel.
std::vector<double> read_channels(Line& line) {
  std::vector<double> values = {line.number()};
  while (line.more() && values.size() < kMostChannels) values.push_back(line.number());
  return values;
}

// `256 224`, or for what is not square `resize-height resize-width height width`.
void read_sizes(Line& line, ModelFacts& facts) {
  facts.resize_height = facts.resize_width = line.small(1, kMostSide);
  facts.image_height = facts.image_width = line.small(1, kMostSide);
  if (line.more()) {
    facts.resize_width = facts.image_height;
    facts.image_height = line.small(1, kMostSide);
    facts.image_width = line.small(1, kMostSide);
  }
  if (facts.image_height > facts.resize_height || facts.image_width > facts.resize_width)
    line.refuse();
}

Interpolation read_interpolation(Line& line) {
  const std::string text = line.word();
  if (text == "bilinear") return Interpolation::bilinear;
  if (text == "nearest") return Interpolation::nearest;
  if (text != "bicubic") line.refuse();
  return Interpolation::bicubic;
}

// One line's entry into `facts`. False for a key that is not known.
bool read_entry(const std::string& key, Line& line, ModelFacts& facts) {
  if (key == "spach-model") {
    line.integer(1, 1);
  } else if (key == "name") {
    facts.name = line.word();
  } else if (key == "precision") {
    facts.precision = line.word();
  } else if (key == "flavour") {
    facts.flavour = line.word();
    if (facts.flavour != "tensorrt" && facts.flavour != "tensorrt-rtx") line.refuse();
  } else if (key == "version") {
    facts.version = line.word();
  } else if (key == "version-compatible") {
    facts.version_compatible = line.small(0, 1) == 1;
  } else if (key == "gpus") {
    while (line.more() && facts.gpus.size() < 64) facts.gpus.push_back(line.small(10, 9999));
  } else if (key == "batch") {
    facts.batch = read_batch(line);
  } else if (key == "input") {
    facts.input = read_tensor(line);
  } else if (key == "output") {
    OutputFacts output{read_tensor(line), Tolerance(), Role::other};
    if (output.tensor.dtype != DType::int64) output.tolerance = read_tolerance(line);
    output.role = read_role(line, output.tensor.name);
    facts.outputs.push_back(std::move(output));
  } else if (key == "resize") {
    read_sizes(line, facts);
  } else if (key == "interpolation") {
    facts.interpolation = read_interpolation(line);
  } else if (key == "pillow") {
    facts.pillow = line.small(1, 9999);
  } else if (key == "mean") {
    facts.mean = read_channels(line);
  } else if (key == "std") {
    facts.stddev = read_channels(line);
    for (const double value : facts.stddev)
      if (!(value > 0)) line.refuse();
  } else if (key == "plan") {
    facts.plan = read_file_facts(line);
  } else if (key == "golden") {
    facts.golden = read_file_facts(line);
  } else {
    return false;
  }
  return true;
}

constexpr const char* kKeys[] = {
    "spach-model", "name",  "precision", "flavour", "version", "version-compatible",
    "gpus",        "batch", "input",     "output",  "resize",  "pillow",
    "mean",        "std",   "plan",      "golden"};

Error malformed(const std::string& what) {
  return Error{ErrorCode::bad_file, "model.txt " + what + "."};
}

// Whether the input is one that preprocessing can make, and the outputs can be told apart.
Status check_tensors(const ModelFacts& facts) {
  const std::int64_t height = facts.image_height, width = facts.image_width;
  const std::int64_t channels = facts.channels();
  const bool pixels = facts.input.dtype == DType::uint8;
  const std::vector<std::int64_t> wanted =
      pixels ? std::vector<std::int64_t>{height, width, channels}
             : std::vector<std::int64_t>{channels, height, width};
  if (facts.stddev.size() != facts.mean.size())
    return malformed("has a mean and a std of different numbers of channels");
  if (facts.input.dtype == DType::int64 || facts.input.shape != wanted)
    return malformed("describes an input that no picture of the model's size becomes");
  std::set<std::string> names = {facts.input.name};
  const OutputFacts* logits = facts.find(Role::logits);
  for (const OutputFacts& output : facts.outputs) {
    const TensorFacts& tensor = output.tensor;
    if (!names.insert(tensor.name).second) return malformed("names two tensors " + tensor.name);
    const bool is_list = tensor.shape.size() == 1;
    const bool is_ranking = tensor.dtype == DType::int64;
    if (tensor.dtype == DType::uint8 || (!is_list && (is_ranking || output.are_scores())))
      return malformed("describes an output that is no list of numbers: " + tensor.name);
    if (is_ranking && (logits == nullptr || output.role == Role::logits))
      return malformed("describes an output that ranks classes without logits: " + tensor.name);
  }
  return Done{};
}

Result<ModelFacts> parse(std::string_view text) {
  ModelFacts facts;
  std::set<std::string> seen;
  std::istringstream lines{std::string(text)};
  int number = 0;
  for (std::string content; std::getline(lines, content);) {
    ++number;
    Line line(content);
    if (!line.more()) continue;
    const std::string key = line.word();
    const std::string where = "has in line " + std::to_string(number) + " ";
    if (number == 1 && key != "spach-model")
      return malformed("does not begin as a model file does");
    if (!seen.insert(key).second && key != "output") return malformed(where + "a second " + key);
    if (!read_entry(key, line, facts)) return malformed(where + "an unknown entry");
    if (!line.ended_well()) return malformed(where + "an unusable " + key);
    if (facts.outputs.size() > kMostOutputs) return malformed("has too many outputs");
  }
  for (const char* key : kKeys)
    if (seen.count(key) == 0) return malformed(std::string("has no entry ") + key);
  if (Status status = check_tensors(facts); !status) return status.error();
  return facts;
}

}  // namespace

std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::float32: return 4;
    case DType::float16: return 2;
    case DType::uint8: return 1;
    case DType::int64: return 8;
  }
  return 1;
}

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float16: return "float16";
    case DType::uint8: return "uint8";
    case DType::int64: return "int64";
  }
  return "unknown";
}

std::size_t TensorFacts::items() const noexcept {
  std::size_t count = 1;
  for (const std::int64_t extent : shape) count *= static_cast<std::size_t>(extent);
  return count;
}

std::size_t TensorFacts::bytes() const noexcept {
  return items() * size_of(dtype);
}

const char* name_of(Role role) noexcept {
  switch (role) {
    case Role::other: return "other";
    case Role::logits: return "logits";
    case Role::embedding: return "embedding";
    case Role::features: return "features";
    case Role::probabilities: return "probabilities";
    case Role::top_values: return "top_values";
    case Role::top_indices: return "top_indices";
  }
  return "unknown";
}

const OutputFacts* ModelFacts::find(Role role) const noexcept {
  for (const OutputFacts& output : outputs)
    if (output.role == role) return &output;
  return nullptr;
}

const OutputFacts* ModelFacts::find(const std::string& called) const noexcept {
  for (const OutputFacts& output : outputs)
    if (output.tensor.name == called) return &output;
  return nullptr;
}

int ModelFacts::classes() const noexcept {
  const OutputFacts* logits = find(Role::logits);
  return logits == nullptr ? 0 : static_cast<int>(logits->tensor.items());
}

Result<ModelFacts> parse_facts(std::string_view text) noexcept {
  return guarded([&]() -> Result<ModelFacts> { return parse(text); });
}

}  // namespace spach
