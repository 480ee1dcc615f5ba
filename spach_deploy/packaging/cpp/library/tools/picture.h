// Pictures from files: PPM, and JPEG and PNG where the program was built with them.
#pragma once

#include <string>
#include <vector>

#include "spach/spach.h"

namespace tools {

struct Picture {
  std::vector<unsigned char> rgb;
  int width = 0;
  int height = 0;
};

// 8 bits a channel, as Pillow's convert("RGB") makes them: grey and palettes become RGB, what is
// transparent becomes opaque, and orientation and colour profile are not looked at.
spach::Result<Picture> read_picture(const std::string& path);

}  // namespace tools
