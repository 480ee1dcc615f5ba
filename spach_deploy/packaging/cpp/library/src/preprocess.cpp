#include "spach/preprocess.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "guard.h"
#include "half.h"

namespace spach {
namespace {

constexpr std::int64_t kMostPixels =
    2 * std::int64_t{89'478'485};  // as spach_deploy.data.preprocess
constexpr std::int64_t kMostAspect = 200;

// Weights are fixed-point numbers with so many bits behind the point: eight bits of a pixel and two
// of headroom for the filter's overshoot leave 22 of 32.
constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr double kBicubicSupport = 2.0;

using Levels = std::vector<std::uint8_t>;  // RGB8, rows without gaps

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Which inputs an output pixel is made of, and in what proportion.
struct Taps {
  int first = 0;
  std::vector<std::int32_t> weights;
};

// The taps of output `at` where `in` pixels become `out`: Pillow's, rounding for rounding.
Taps taps_of(int at, int in, int out) {
  const double scale = static_cast<double>(in) / out;
  const double filter_scale = std::max(scale, 1.0);  // widened when shrinking: the antialiasing
  const double support = kBicubicSupport * filter_scale;
  const double centre = (at + 0.5) * scale;
  const double step = 1.0 / filter_scale;
  const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
  const int last = std::min(static_cast<int>(centre + support + 0.5), in);

  std::vector<double> exact;
  double sum = 0.0;
  for (int x = first; x < last; ++x) {
    exact.push_back(bicubic((x - centre + 0.5) * step));
    sum += exact.back();
  }
  Taps taps;
  taps.first = first;
  for (double weight : exact) {
    if (sum != 0.0) weight /= sum;
    const double fixed = weight * (1 << kPrecisionBits);
    taps.weights.push_back(static_cast<std::int32_t>(fixed < 0 ? fixed - 0.5 : fixed + 0.5));
  }
  return taps;
}

// Taps of the outputs `start` to `start + count`: the crop's, the others are never looked at.
std::vector<Taps> taps_of_crop(int start, int count, int in, int out) {
  std::vector<Taps> taps;
  taps.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) taps.push_back(taps_of(start + i, in, out));
  return taps;
}

// Weighted sum of `taps.weights.size()` values that are `stride` bytes apart.
std::uint8_t apply(const Taps& taps, const std::uint8_t* values, std::size_t stride) {
  std::int32_t sum = 1 << (kPrecisionBits - 1);
  for (std::size_t i = 0; i < taps.weights.size(); ++i)
    sum += std::int32_t{values[i * stride]} * taps.weights[i];
  return static_cast<std::uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
}

// Half of `difference`, halves to even: as Python's round() places a crop.
int half_to_even(int difference) {
  const int half = difference / 2;
  return half + (difference % 2 != 0 && half % 2 != 0 ? 1 : 0);
}

Status check_image(const Image& image) {
  const std::int64_t width = image.width, height = image.height;
  const std::string size = std::to_string(width) + " x " + std::to_string(height);
  if (image.rgb == nullptr) return Error{ErrorCode::bad_argument, "The picture is a null pointer."};
  if (width < 1 || height < 1)
    return Error{ErrorCode::bad_argument, "The picture has no pixels (" + size + ")."};
  if (width * height > kMostPixels)
    return Error{ErrorCode::bad_argument, "The picture is too large (" + size + " pixels)."};
  if (std::max(width, height) > kMostAspect * std::min(width, height))
    return Error{ErrorCode::bad_argument, "The picture is too elongated (" + size + ")."};
  if (image.stride != 0 && image.stride < 3 * static_cast<std::size_t>(width))
    return Error{ErrorCode::bad_argument, "The picture's rows overlap: the stride is too small."};
  return Done{};
}

// Pixels in memory: where the first one is, and how many bytes the next row is away.
struct Rows {
  const std::uint8_t* first;
  std::size_t stride;
};

// Every row's `columns`, whose taps count from column `origin`: `count` rows of columns.size()
// pixels.
Levels across(Rows from, int count, const std::vector<Taps>& columns, int origin) {
  Levels result(3 * columns.size() * static_cast<std::size_t>(count));
  std::uint8_t* to = result.data();
  for (int y = 0; y < count; ++y, from.first += from.stride)
    for (const Taps& taps : columns)
      for (std::size_t channel = 0; channel < 3; ++channel)
        *to++ = apply(taps,
                      from.first + 3 * static_cast<std::size_t>(taps.first - origin) + channel, 3);
  return result;
}

// The `rows`, whose taps count from row `origin`, each `bytes` long.
Levels down(Rows from, std::size_t bytes, const std::vector<Taps>& rows, int origin) {
  Levels result(bytes * rows.size());
  std::uint8_t* to = result.data();
  for (const Taps& taps : rows) {
    const std::uint8_t* top =
        from.first + static_cast<std::size_t>(taps.first - origin) * from.stride;
    for (std::size_t x = 0; x < bytes; ++x) *to++ = apply(taps, top + x, from.stride);
  }
  return result;
}

int first_of(const std::vector<Taps>& taps) {
  return taps.front().first;
}

int end_of(const std::vector<Taps>& taps) {
  return taps.back().first + static_cast<int>(taps.back().weights.size());
}

// Resize the shorter side to `shorter`, cut `crop` x `crop` out of the middle. In two passes with
// whole levels between them, so that their order shows: Pillow's, that changed with version 13.
Levels resize_and_crop(const Image& image, int shorter, int crop, int pillow) {
  const std::int64_t width = image.width, height = image.height;
  const bool upright = width <= height;
  const int to_width = upright ? shorter : static_cast<int>(shorter * width / height);
  const int to_height = upright ? static_cast<int>(shorter * height / width) : shorter;
  const auto columns = taps_of_crop(half_to_even(to_width - crop), crop, image.width, to_width);
  const auto rows = taps_of_crop(half_to_even(to_height - crop), crop, image.height, to_height);
  const std::size_t stride = image.stride != 0 ? image.stride : 3 * static_cast<std::size_t>(width);

  const std::int64_t saved_rows = height - to_height, saved_columns = width - to_width;
  if (pillow >= 13 && saved_rows > 0 && saved_rows > 2 * saved_columns) {
    const auto left = static_cast<std::size_t>(first_of(columns));
    const std::size_t bytes = 3 * (static_cast<std::size_t>(end_of(columns)) - left);
    const Levels low = down({image.rgb + 3 * left, stride}, bytes, rows, 0);
    return across({low.data(), bytes}, crop, columns, first_of(columns));
  }
  const int top = first_of(rows);
  const Rows used{image.rgb + static_cast<std::size_t>(top) * stride, stride};
  const Levels narrow = across(used, end_of(rows) - top, columns, 0);
  const std::size_t bytes = 3 * columns.size();
  return down({narrow.data(), bytes}, bytes, rows, top);
}

// RGB RGB ... -> RR.. GG.. BB..
template <typename T, typename Convert>
void write_planes(const Levels& pixels, void* destination, Convert convert) {
  const std::size_t plane = pixels.size() / 3;
  auto* to = static_cast<char*>(destination);  // the caller's memory may be of any alignment
  for (std::size_t channel = 0; channel < 3; ++channel) {
    for (std::size_t i = 0; i < plane; ++i, to += sizeof(T)) {
      const T value = convert(channel, pixels[3 * i + channel]);
      std::memcpy(to, &value, sizeof value);
    }
  }
}

}  // namespace

Preprocessor::Preprocessor(const ModelFacts& facts)
    : image_size_(facts.image_size),
      resize_size_(facts.resize_size),
      pillow_(facts.pillow),
      dtype_(facts.input.dtype) {
  for (std::size_t channel = 0; channel < 3; ++channel) {
    const auto mean = static_cast<float>(facts.mean[channel]);
    const auto stddev = static_cast<float>(facts.stddev[channel]);
    for (int level = 0; level < 256; ++level)
      normalized_.push_back((static_cast<float>(level) / 255.0f - mean) / stddev);
  }
}

Result<std::vector<std::uint8_t>> Preprocessor::pixels(const Image& image) const noexcept {
  return guarded([&]() -> Result<std::vector<std::uint8_t>> {
    if (Status status = check_image(image); !status) return status.error();
    return resize_and_crop(image, resize_size_, image_size_, pillow_);
  });
}

Status Preprocessor::write(const Image& image, void* destination) const noexcept {
  Result<std::vector<std::uint8_t>> result = pixels(image);
  if (!result) return result.error();
  const Levels& levels = *result;
  const auto normalized = [this](std::size_t channel, std::uint8_t level) {
    return normalized_[256 * channel + level];
  };
  if (dtype_ == DType::uint8) {
    std::memcpy(destination, levels.data(), levels.size());
  } else if (dtype_ == DType::float16) {
    write_planes<std::uint16_t>(levels, destination, [&](std::size_t channel, std::uint8_t level) {
      return half_from_float(normalized(channel, level));
    });
  } else {
    write_planes<float>(levels, destination, normalized);
  }
  return Done{};
}

}  // namespace spach
