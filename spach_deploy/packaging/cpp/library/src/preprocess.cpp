#include "spach/preprocess.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>

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

using Levels = std::vector<std::uint8_t>;  // pixels, rows without gaps

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

double bilinear(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

struct Filter {
  double (*weight)(double);
  double support;
};

Filter filter_of(Interpolation interpolation) {
  if (interpolation == Interpolation::bilinear) return {bilinear, 1.0};
  return {bicubic, 2.0};
}

// Which inputs an output pixel is made of, and in what proportion.
struct Taps {
  int first = 0;
  std::vector<std::int32_t> weights;
};

// The taps of output `at` where `in` pixels become `out`: Pillow's, rounding for rounding.
Taps taps_of(int at, int in, int out, const Filter& filter) {
  const double scale = static_cast<double>(in) / out;
  const double filter_scale = std::max(scale, 1.0);  // widened when shrinking: the antialiasing
  const double support = filter.support * filter_scale;
  const double centre = (at + 0.5) * scale;
  const double step = 1.0 / filter_scale;
  const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
  const int last = std::min(static_cast<int>(centre + support + 0.5), in);

  std::vector<double> exact;
  double sum = 0.0;
  for (int x = first; x < last; ++x) {
    exact.push_back(filter.weight((x - centre + 0.5) * step));
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

// The nearest input of each output, as a tap of its whole weight. Pillow adds up positions,
// rounding for rounding.
std::vector<Taps> nearest_taps(int start, int count, int in, int out) {
  std::vector<Taps> taps;
  taps.reserve(static_cast<std::size_t>(count));
  const double scale = static_cast<double>(in) / out;
  double position = scale * 0.5;
  for (int at = 0; at < start + count; ++at, position += scale)
    if (at >= start)
      taps.push_back({std::min(static_cast<int>(position), in - 1), {1 << kPrecisionBits}});
  return taps;
}

// Taps of the outputs `start` to `start + count`: the crop's, the others are never looked at.
std::vector<Taps> taps_of_crop(int start, int count, int in, int out, Interpolation interpolation) {
  if (interpolation == Interpolation::nearest) return nearest_taps(start, count, in, out);
  std::vector<Taps> taps;
  taps.reserve(static_cast<std::size_t>(count));
  const Filter filter = filter_of(interpolation);
  for (int i = 0; i < count; ++i) taps.push_back(taps_of(start + i, in, out, filter));
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

std::size_t row_bytes(const Image& image) {
  return static_cast<std::size_t>(image.channels) * static_cast<std::size_t>(image.width);
}

Status check_image(const Image& image, int channels) {
  const std::int64_t width = image.width, height = image.height;
  const std::string size = std::to_string(width) + " x " + std::to_string(height);
  if (image.rgb == nullptr) return Error{ErrorCode::bad_argument, "The picture is a null pointer."};
  if (image.channels != channels && !(channels == 1 && image.channels == 3))
    return Error{ErrorCode::bad_argument, "The picture has " + std::to_string(image.channels) +
                                              " channels, and the model takes " +
                                              std::to_string(channels) + "."};
  if (width < 1 || height < 1)
    return Error{ErrorCode::bad_argument, "The picture has no pixels (" + size + ")."};
  if (width * height > kMostPixels)
    return Error{ErrorCode::bad_argument, "The picture is too large (" + size + " pixels)."};
  if (std::max(width, height) > kMostAspect * std::min(width, height))
    return Error{ErrorCode::bad_argument, "The picture is too elongated (" + size + ")."};
  if (image.stride != 0 && image.stride < row_bytes(image))
    return Error{ErrorCode::bad_argument, "The picture's rows overlap: the stride is too small."};
  return Done{};
}

// Pixels in memory: where the first one is, and how many bytes the next row is away.
struct Rows {
  const std::uint8_t* first;
  std::size_t stride;
};

// Every row's `columns`, whose taps count from column `origin`: `count` rows of columns.size()
// pixels of `channels` bytes.
Levels across(Rows from, int count, const std::vector<Taps>& columns, int origin,
              std::size_t channels) {
  Levels result(channels * columns.size() * static_cast<std::size_t>(count));
  std::uint8_t* to = result.data();
  for (int y = 0; y < count; ++y, from.first += from.stride)
    for (const Taps& taps : columns)
      for (std::size_t channel = 0; channel < channels; ++channel)
        *to++ = apply(
            taps, from.first + channels * static_cast<std::size_t>(taps.first - origin) + channel,
            channels);
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

// RGB to grey, as Pillow converts to "L".
Levels grey_of(const Image& image) {
  Levels result;
  result.reserve(static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height));
  const std::size_t stride = image.stride != 0 ? image.stride : row_bytes(image);
  for (int y = 0; y < image.height; ++y) {
    const std::uint8_t* row = image.rgb + static_cast<std::size_t>(y) * stride;
    for (int x = 0; x < image.width; ++x, row += 3) {
      const std::uint32_t sum = 19595u * row[0] + 38470u * row[1] + 7471u * row[2];
      result.push_back(static_cast<std::uint8_t>((sum + 0x8000u) >> 16));
    }
  }
  return result;
}

struct Size {
  int height;
  int width;
};

// The size of a picture that was resized, in its shape, until it just covers `cover`.
Size resized_size(const Image& image, const Size& cover) {
  const std::int64_t width = image.width, height = image.height;
  if (width * cover.height <= height * cover.width)
    return {static_cast<int>(cover.width * height / width), cover.width};
  return {cover.height, static_cast<int>(cover.height * width / height)};
}

// Resize to `to`, cut `crop` out of the middle. In two passes with whole levels between them, so
// that their order shows: Pillow's, that changed with version 13.
Levels resize_and_crop(const Image& image, const Size& to, const Size& crop,
                       Interpolation interpolation, int pillow) {
  const auto columns = taps_of_crop(half_to_even(to.width - crop.width), crop.width, image.width,
                                    to.width, interpolation);
  const auto rows = taps_of_crop(half_to_even(to.height - crop.height), crop.height, image.height,
                                 to.height, interpolation);
  const std::size_t stride = image.stride != 0 ? image.stride : row_bytes(image);
  const auto channels = static_cast<std::size_t>(image.channels);

  const std::int64_t saved_rows = image.height - to.height, saved_columns = image.width - to.width;
  if (pillow >= 13 && saved_rows > 0 && saved_rows > 2 * saved_columns) {
    const auto left = static_cast<std::size_t>(first_of(columns));
    const std::size_t bytes = channels * (static_cast<std::size_t>(end_of(columns)) - left);
    const Levels low = down({image.rgb + channels * left, stride}, bytes, rows, 0);
    return across({low.data(), bytes}, crop.height, columns, first_of(columns), channels);
  }
  const int top = first_of(rows);
  const Rows used{image.rgb + static_cast<std::size_t>(top) * stride, stride};
  const Levels narrow = across(used, end_of(rows) - top, columns, 0, channels);
  const std::size_t bytes = channels * columns.size();
  return down({narrow.data(), bytes}, bytes, rows, top);
}

// RGB RGB ... -> RR.. GG.. BB..
template <typename T, typename Convert>
void write_planes(const Levels& pixels, std::size_t channels, void* destination, Convert convert) {
  const std::size_t plane = pixels.size() / channels;
  auto* to = static_cast<char*>(destination);  // the caller's memory may be of any alignment
  for (std::size_t channel = 0; channel < channels; ++channel) {
    for (std::size_t i = 0; i < plane; ++i, to += sizeof(T)) {
      const T value = convert(channel, pixels[channels * i + channel]);
      std::memcpy(to, &value, sizeof value);
    }
  }
}

// Threads beside the calling one, for one batch.
class Helpers {
 public:
  ~Helpers() { join(); }

  // So many as make `all` together with the calling one. Where the system has no more threads to
  // give, those that there are do the work.
  template <typename Work>
  void start(std::size_t all, const Work& work) {
    threads_.reserve(all);
    try {
      for (std::size_t i = 1; i < all; ++i) threads_.emplace_back(work);
    } catch (const std::system_error&) {
    }
  }

  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  std::vector<std::thread> threads_;
};

}  // namespace

Preprocessor::Preprocessor(const ModelFacts& facts)
    : image_height_(facts.image_height),
      image_width_(facts.image_width),
      resize_height_(facts.resize_height),
      resize_width_(facts.resize_width),
      interpolation_(facts.interpolation),
      channels_(facts.channels()),
      pillow_(facts.pillow),
      dtype_(facts.input.dtype) {
  for (std::size_t channel = 0; channel < facts.mean.size(); ++channel) {
    const auto mean = static_cast<float>(facts.mean[channel]);
    const auto stddev = static_cast<float>(facts.stddev[channel]);
    for (int level = 0; level < 256; ++level)
      normalized_.push_back((static_cast<float>(level) / 255.0f - mean) / stddev);
  }
}

Result<std::vector<std::uint8_t>> Preprocessor::pixels(const Image& image) const noexcept {
  return guarded([&]() -> Result<std::vector<std::uint8_t>> {
    if (Status status = check_image(image, channels_); !status) return status.error();
    const Size to = resized_size(image, {resize_height_, resize_width_});
    const Size crop{image_height_, image_width_};
    if (image.channels == channels_)
      return resize_and_crop(image, to, crop, interpolation_, pillow_);
    const Levels grey = grey_of(image);
    const Image picture{grey.data(), image.width, image.height, 0, 1};
    return resize_and_crop(picture, to, crop, interpolation_, pillow_);
  });
}

Status Preprocessor::write(const Image& image, void* destination) const noexcept {
  Result<std::vector<std::uint8_t>> result = pixels(image);
  if (!result) return result.error();
  const Levels& levels = *result;
  const auto channels = static_cast<std::size_t>(channels_);
  const auto normalized = [this](std::size_t channel, std::uint8_t level) {
    return normalized_[256 * channel + level];
  };
  if (dtype_ == DType::uint8) {
    std::memcpy(destination, levels.data(), levels.size());
  } else if (dtype_ == DType::float16) {
    const auto half = [&](std::size_t channel, std::uint8_t level) {
      return half_from_float(normalized(channel, level));
    };
    write_planes<std::uint16_t>(levels, channels, destination, half);
  } else {
    write_planes<float>(levels, channels, destination, normalized);
  }
  return Done{};
}

Status Preprocessor::write(const Image* images, std::size_t count, void* destination,
                           int threads) const noexcept {
  return guarded([&]() -> Status {
    if (images == nullptr || destination == nullptr)
      return Error{ErrorCode::bad_argument, "A null pointer was given."};
    if (threads < 1)
      return Error{ErrorCode::bad_argument,
                   "Pictures are preprocessed on at least one thread, not on " +
                       std::to_string(threads) + "."};
    const std::size_t bytes = static_cast<std::size_t>(image_height_) *
                              static_cast<std::size_t>(image_width_) *
                              static_cast<std::size_t>(channels_) * size_of(dtype_);
    std::vector<Status> results(count, Done{});
    std::atomic<std::size_t> next{0};
    const auto work = [&]() noexcept {
      for (std::size_t i = next++; i < count; i = next++)
        results[i] = write(images[i], static_cast<char*>(destination) + i * bytes);
    };
    Helpers helpers;
    helpers.start(std::min(static_cast<std::size_t>(threads), count), work);
    work();
    helpers.join();
    const auto failed =
        std::find_if(results.begin(), results.end(), [](const Status& status) { return !status; });
    return failed == results.end() ? Status(Done{}) : *failed;
  });
}

}  // namespace spach
