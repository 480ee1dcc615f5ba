// From pixels of a picture of any size to what the model takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "spach/facts.h"
#include "spach/result.h"

namespace spach {

// Pixels that the caller owns: rows from top to bottom, three bytes a pixel, red first; or as many
// bytes as the model has channels. A model of one channel takes RGB too, and makes it grey.
struct Image {
  const std::uint8_t* rgb = nullptr;
  int width = 0;
  int height = 0;
  std::size_t stride = 0;  // bytes from row to row; 0: channels * width
  int channels = 3;        // bytes of a pixel
};

// The model's evaluation transform: resize until the picture just covers the resize size, centre
// crop, scale to 0..1, normalize by channel. The resize computes as Pillow does, in the same fixed
// point, so that its pixels are Pillow's pixels. Use from several threads at once is safe.
class Preprocessor {
 public:
  explicit Preprocessor(const ModelFacts& facts);

  // The resized and cropped picture, height x width x channels.
  Result<std::vector<std::uint8_t>> pixels(const Image& image) const noexcept;

  // Writes one image's input, input.bytes() of them, to `destination`.
  Status write(const Image& image, void* destination) const noexcept;

  // Writes `count` images' inputs one after another, on up to `threads` threads; the bytes are the
  // same on any number of them. The error is that of the first image that has one.
  Status write(const Image* images, std::size_t count, void* destination,
               int threads) const noexcept;

 private:
  int image_height_;
  int image_width_;
  int resize_height_;
  int resize_width_;
  Interpolation interpolation_;
  int channels_;
  int pillow_;
  DType dtype_;
  std::vector<float> normalized_;  // (channels, 256): what a channel's level becomes
};

}  // namespace spach
