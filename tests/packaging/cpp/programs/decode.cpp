// decode LIST: every picture of a list, one path a line. Prints its size, and writes its pixels to
// PATH.rgb, or prints why it is none.

#include <cstdio>
#include <fstream>
#include <string>

#include "picture.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::ifstream names(argv[1]);
  for (std::string path; std::getline(names, path);) {
    const spach::Result<tools::Picture> picture = tools::read_picture(path);
    if (!picture) {
      if (picture.error().message.find(path + " ") != 0) return 1;  // a sentence about this file
      std::printf("%s\n", picture.error().message.substr(path.size() + 1).c_str());
      continue;
    }
    std::printf("%d x %d\n", picture->width, picture->height);
    std::ofstream(path + ".rgb", std::ios::binary)
        .write(reinterpret_cast<const char*>(picture->rgb.data()),
               static_cast<std::streamsize>(picture->rgb.size()));
  }
  return 0;
}
