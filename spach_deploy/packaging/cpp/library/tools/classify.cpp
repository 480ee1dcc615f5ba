// Prints the best classes of PPM pictures: spach_classify [-k K] [-m FOLDER] image.ppm ...

#include <cctype>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "common.h"

namespace {

struct Picture {
  std::vector<unsigned char> rgb;
  int width = 0;
  int height = 0;
};

// The next number of a PPM header, comments skipped; -1 for anything else.
int header_number(std::istream& in) {
  for (int c = in.peek(); std::isspace(c) || c == '#'; c = in.peek()) {
    if (c == '#') {
      while (c != '\n' && c != EOF) c = in.get();
    } else {
      in.get();
    }
  }
  int value = -1;
  for (int c = in.peek(); std::isdigit(c); c = in.peek()) {
    value = (value < 0 ? 0 : value) * 10 + (in.get() - '0');
    if (value > 1000000) return -1;
  }
  return value;
}

// Binary PPM (P6) with 8 bits a channel.
spach::Result<Picture> read_ppm(const std::string& path) {
  const auto refuse = [&path](const char* why) {
    return spach::Error{spach::ErrorCode::bad_file, path + " " + why};
  };
  std::ifstream in(path, std::ios::binary);
  char magic[2] = {};
  if (!in.read(magic, 2)) return refuse("cannot be read.");
  if (magic[0] != 'P' || magic[1] != '6') return refuse("is not a binary PPM picture (P6).");
  Picture picture;
  picture.width = header_number(in);
  picture.height = header_number(in);
  if (header_number(in) != 255) return refuse("does not have 8 bits a channel.");
  in.get();
  const long long pixels = static_cast<long long>(picture.width) * picture.height;
  if (picture.width < 1 || picture.height < 1 || pixels > 178956970)
    return refuse("has an unusable size.");
  picture.rgb.resize(static_cast<std::size_t>(pixels) * 3);
  if (!in.read(reinterpret_cast<char*>(picture.rgb.data()),
               static_cast<std::streamsize>(picture.rgb.size())))
    return refuse("ends before its last pixel.");
  return picture;
}

int classify(const std::string& folder, int k, const std::vector<std::string>& paths) {
  std::vector<Picture> pictures;
  for (const std::string& path : paths) {
    spach::Result<Picture> picture = read_ppm(path);
    if (!picture) return tools::fail(picture.error());
    pictures.push_back(std::move(*picture));
  }
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return tools::fail(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return tools::fail(context.error());

  std::vector<spach::Image> images;
  for (const Picture& picture : pictures)
    images.push_back({picture.rgb.data(), picture.width, picture.height});
  const auto ranked = context->classify(images.data(), images.size(), static_cast<std::size_t>(k));
  if (!ranked) return tools::fail(ranked.error());
  for (std::size_t i = 0; i < paths.size(); ++i) {
    std::printf("%s\n", paths[i].c_str());
    for (const spach::Prediction& best : (*ranked)[i])
      std::printf("  %6.2f%%  %4d  %s\n", 100 * static_cast<double>(best.probability), best.index,
                  best.label.c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::string folder = "model";
  int k = 5;
  std::vector<std::string> paths;
  bool good = true;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "-m" && i + 1 < argc) {
      folder = argv[++i];
    } else if (argument == "-k" && i + 1 < argc) {
      k = tools::positive(argv[++i], 1000000);
    } else if (!argument.empty() && argument[0] == '-') {
      good = false;
    } else {
      paths.push_back(argument);
    }
  }
  if (!good || k == 0 || paths.empty())
    return tools::usage("spach_classify [-k K] [-m FOLDER] image.ppm ...");
  return classify(folder, k, paths);
}
