// Prints the best classes of JPEG, PNG and PPM pictures.

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "common.h"
#include "picture.h"

namespace {

int classify(const std::string& folder, const spach::EngineOptions& options, int k,
             const std::vector<std::string>& paths) {
  std::vector<tools::Picture> pictures;
  for (const std::string& path : paths) {
    spach::Result<tools::Picture> picture = tools::read_picture(path);
    if (!picture) return tools::fail(picture.error());
    pictures.push_back(std::move(*picture));
  }
  const spach::Result<spach::Engine> engine = spach::Engine::load(tools::path_of(folder), options);
  if (!engine) return tools::fail(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return tools::fail(context.error());

  std::vector<spach::Image> images;
  for (const tools::Picture& picture : pictures)
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
  spach::EngineOptions options;
  int k = 5;
  std::vector<std::string> paths;
  bool good = true;
  const std::vector<std::string> given = tools::arguments(argc, argv);
  for (std::size_t i = 0; i < given.size(); ++i) {
    const std::string& argument = given[i];
    if (argument == "-m" && i + 1 < given.size()) {
      folder = given[++i];
    } else if (argument == "-k" && i + 1 < given.size()) {
      k = tools::positive(given[++i], 1000000);
    } else if (argument == "-t" && i + 1 < given.size()) {
      options.threads = tools::positive(given[++i], 1024);
    } else if (!argument.empty() && argument[0] == '-') {
      good = false;
    } else {
      paths.push_back(argument);
    }
  }
  if (!good || k == 0 || options.threads == 0 || paths.empty())
    return tools::usage("spach_classify [-k K] [-t THREADS] [-m FOLDER] picture.jpg ...");
  return classify(folder, options, k, paths);
}
