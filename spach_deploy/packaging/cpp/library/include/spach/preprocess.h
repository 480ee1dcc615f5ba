// From RGB8 pixels of any size to what the model takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "spach/facts.h"
#include "spach/result.h"

namespace spach {

// Pixels that the caller owns: rows from top to bottom, three bytes a pixel, red first.
struct Image {
  const std::uint8_t* rgb = nullptr;
  int width = 0;
  int height = 0;
  std::size_t stride = 0;  // bytes from row to row; 0: 3 * width
};

// The published evaluation transform: shorter side to resize_size with antialiased bicubic, centre
// crop, scale to 0..1, normalize by channel. The resize computes as Pillow does, in the same fixed
// point, so that its pixels are Pillow's pixels. Use from several threads at once is safe.
class Preprocessor {
 public:
  explicit Preprocessor(const ModelFacts& facts);

  // The resized and cropped picture, image_size x image_size RGB8.
  Result<std::vector<std::uint8_t>> pixels(const Image& image) const noexcept;

  // Writes one image's input, input.bytes() of them, to `destination`.
  Status write(const Image& image, void* destination) const noexcept;

 private:
  int image_size_;
  int resize_size_;
  int pillow_;
  DType dtype_;
  std::vector<float> normalized_;  // (3, 256): what a channel's level becomes
};

}  // namespace spach
