#include "picture.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#ifdef SPACH_WITH_JPEG
#include <jerror.h>
#include <jpeglib.h>
#endif
#ifdef SPACH_WITH_PNG
#include <png.h>
#endif

namespace tools {
namespace {

using Bytes = std::vector<unsigned char>;

constexpr long long kMostPixels = 178956970;  // as the library takes

// Why a file is no picture; "" where it is one.
using Problem = std::string;

// Makes room for a picture of a size that a file claims.
Problem make_room(Picture& picture, long long width, long long height) {
  if (width < 1 || height < 1 || width > kMostPixels || height > kMostPixels ||
      width * height > kMostPixels)
    return "has an unusable size.";
  picture.width = static_cast<int>(width);
  picture.height = static_cast<int>(height);
  picture.rgb.resize(static_cast<std::size_t>(width * height) * 3);
  return {};
}

[[maybe_unused]] unsigned char* row_of(Picture& picture, std::size_t row) {
  return picture.rgb.data() + row * static_cast<std::size_t>(picture.width) * 3;
}

// PPM

bool is_space(unsigned char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

// The next number of a PPM header, comments skipped; -1 for anything else.
long long header_number(const Bytes& file, std::size_t& at) {
  for (; at < file.size() && (is_space(file[at]) || file[at] == '#'); ++at)
    if (file[at] == '#')
      while (at < file.size() && file[at] != '\n') ++at;
  long long value = -1;
  for (; at < file.size() && file[at] >= '0' && file[at] <= '9'; ++at) {
    value = (value < 0 ? 0 : value) * 10 + (file[at] - '0');
    if (value > 1000000) return -1;
  }
  return value;
}

// Binary PPM (P6) with 8 bits a channel.
Problem read_ppm(const Bytes& file, Picture& picture) {
  std::size_t at = 2;
  const long long width = header_number(file, at), height = header_number(file, at);
  if (header_number(file, at) != 255) return "does not have 8 bits a channel.";
  if (Problem problem = make_room(picture, width, height); !problem.empty()) return problem;
  ++at;  // one white space
  if (at > file.size() || file.size() - at < picture.rgb.size())
    return "ends before its last pixel.";
  std::memcpy(picture.rgb.data(), file.data() + at, picture.rgb.size());
  return {};
}

// JPEG. The library leaves a function by longjmp where a file is damaged: what has a destructor
// stands outside of it.

#ifdef SPACH_WITH_JPEG

struct JpegErrors {
  jpeg_error_mgr base;
  std::jmp_buf back;
  bool ends_early;
  char message[JMSG_LENGTH_MAX];
};

void jpeg_failed(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  info->err->format_message(info, errors->message);
  std::longjmp(errors->back, 1);
}

// Prints no warning. Of them, Pillow refuses the one that says that the file ends early.
void jpeg_message(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF)
    reinterpret_cast<JpegErrors*>(info->err)->ends_early = true;
}

// Reads the header, and rows where `picture` has room for them.
bool decode_jpeg(const Bytes& file, jpeg_decompress_struct& info, JpegErrors& errors,
                 Picture* picture) {
  info.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = jpeg_failed;
  errors.base.emit_message = jpeg_message;
  if (setjmp(errors.back) != 0) return false;
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, file.data(), static_cast<unsigned long>(file.size()));
  jpeg_read_header(&info, TRUE);
  if (picture == nullptr) return true;
  info.out_color_space = JCS_RGB;
  jpeg_start_decompress(&info);
  while (info.output_scanline < info.output_height) {
    JSAMPROW row = row_of(*picture, info.output_scanline);
    jpeg_read_scanlines(&info, &row, 1);
  }
  jpeg_finish_decompress(&info);
  return true;
}

Problem read_jpeg(const Bytes& file, Picture& picture) {
  JpegErrors errors{};
  jpeg_decompress_struct info{};
  const bool has_header = decode_jpeg(file, info, errors, nullptr);
  const long long width = info.image_width, height = info.image_height;
  const bool is_cmyk = info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK;
  jpeg_destroy_decompress(&info);
  if (!has_header) return std::string("is no readable JPEG picture: ") + errors.message + ".";
  if (is_cmyk) return "is a JPEG picture in CMYK; save it as RGB.";
  if (Problem problem = make_room(picture, width, height); !problem.empty()) return problem;
  const bool whole = decode_jpeg(file, info, errors, &picture);
  jpeg_destroy_decompress(&info);
  if (!whole) return std::string("is no readable JPEG picture: ") + errors.message + ".";
  return errors.ends_early ? "is a JPEG picture that ends too early." : "";
}

#else

Problem read_jpeg(const Bytes&, Picture&) {
  return "is a JPEG picture, and this program was built without libjpeg.";
}

#endif

// PNG

#ifdef SPACH_WITH_PNG

struct PngSource {
  const unsigned char* at;
  std::size_t left;
  char message[128];
};

void png_failed(png_structp png, png_const_charp message) {
  auto* source = static_cast<PngSource*>(png_get_error_ptr(png));
  std::snprintf(source->message, sizeof source->message, "%s", message);
  png_longjmp(png, 1);
}

void png_warned(png_structp, png_const_charp) {}

void png_take(png_structp png, png_bytep to, std::size_t size) {
  auto* source = static_cast<PngSource*>(png_get_io_ptr(png));
  if (size > source->left) png_error(png, "it ends too early");
  std::memcpy(to, source->at, size);
  source->at += size;
  source->left -= size;
}

bool read_png_header(png_structp png, png_infop info) {
  if (setjmp(png_jmpbuf(png)) != 0) return false;
  png_read_info(png, info);
  return true;
}

bool read_png_rows(png_structp png, png_infop info, png_bytepp rows) {
  if (setjmp(png_jmpbuf(png)) != 0) return false;
  png_set_expand(png);  // palettes, and fewer than 8 bits
  png_set_strip_16(png);
  png_set_strip_alpha(png);
  png_set_gray_to_rgb(png);
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  if (png_get_rowbytes(png, info) != 3 * std::size_t{png_get_image_width(png, info)})
    png_error(png, "its pixels do not become RGB");
  png_read_image(png, rows);
  png_read_end(png, nullptr);
  return true;
}

Problem decode_png(png_structp png, png_infop info, const PngSource& source, Picture& picture) {
  const auto refuse = [&source] {
    return std::string("is no readable PNG picture: ") + source.message + ".";
  };
  if (!read_png_header(png, info)) return refuse();
  if (png_get_bit_depth(png, info) == 16 &&
      (png_get_color_type(png, info) & PNG_COLOR_MASK_COLOR) == 0)
    return "is a grey PNG picture of 16 bits; save it with 8.";  // which value is white?
  if (Problem problem =
          make_room(picture, png_get_image_width(png, info), png_get_image_height(png, info));
      !problem.empty())
    return problem;
  std::vector<png_bytep> rows;
  for (std::size_t y = 0; y < static_cast<std::size_t>(picture.height); ++y)
    rows.push_back(row_of(picture, y));
  return read_png_rows(png, info, rows.data()) ? Problem() : refuse();
}

Problem read_png(const Bytes& file, Picture& picture) {
  PngSource source{file.data(), file.size(), "there is no memory for it"};
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, png_failed, png_warned);
  png_infop info = png != nullptr ? png_create_info_struct(png) : nullptr;
  Problem problem = "cannot be read: there is no memory for it.";
  if (info != nullptr) {
    png_set_read_fn(png, &source, png_take);
    problem = decode_png(png, info, source, picture);
  }
  png_destroy_read_struct(&png, &info, nullptr);
  return problem;
}

#else

Problem read_png(const Bytes&, Picture&) {
  return "is a PNG picture, and this program was built without libpng.";
}

#endif

bool begins(const Bytes& file, const char* magic) {
  const std::size_t size = std::strlen(magic);
  return file.size() >= size && std::memcmp(file.data(), magic, size) == 0;
}

}  // namespace

spach::Result<Picture> read_picture(const std::string& path) {
  std::ifstream in(std::filesystem::u8path(path), std::ios::binary);
  const Bytes file((std::istreambuf_iterator<char>(in)), {});
  Picture picture;
  Problem problem = "is no JPEG, PNG or binary PPM picture (P6).";
  if (!in || file.empty()) {
    problem = "cannot be read.";
  } else if (begins(file, "P6")) {
    problem = read_ppm(file, picture);
  } else if (begins(file, "\xff\xd8\xff")) {
    problem = read_jpeg(file, picture);
  } else if (begins(file, "\x89PNG\r\n\x1a\n")) {
    problem = read_png(file, picture);
  }
  if (problem.empty()) return picture;
  return spach::Error{spach::ErrorCode::bad_file, path + " " + problem};
}

}  // namespace tools
