// Runs the golden pack through the engine, prints the errors, and ends with 0 where it agrees.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "common.h"

namespace {

void print_bound(const char* what, double measured, double allowed) {
  if (std::isfinite(allowed)) {
    std::printf("  %-24s %12.3e %12.3e\n", what, measured, allowed);
  } else {
    std::printf("  %-24s %12.3e\n", what, measured);
  }
}

void print_output(const spach::Comparison& output, std::size_t images) {
  std::printf("%-26s %12s %12s\n", output.output.c_str(), "measured", "allowed");
  if (output.dtype == spach::DType::int64) {
    std::printf("  %-24s %12zu\n", "ranks that differ", output.changed);
  } else {
    print_bound("relative L2, worst image", output.rel_l2, output.allowed.rel_l2);
    print_bound("max absolute error", output.max_abs, output.allowed.max_abs);
    std::printf("  %-24s %12.8f", "cosine, worst image", output.cosine);
    if (output.allowed.cosine_min > -1) std::printf(" %12.8f", output.allowed.cosine_min);
    std::printf("\n");
    if (output.are_scores)
      std::printf("  %-24s %5zu of %3zu\n", "images that change class", output.changed, images);
  }
  for (const std::string& finding : output.findings) std::printf("  FAILED: %s\n", finding.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> given = tools::arguments(argc, argv);
  if (given.size() > 1 || (given.size() == 1 && given[0].rfind('-', 0) == 0))
    return tools::usage("spach_self_test [FOLDER]");
  const std::string folder = given.empty() ? "model" : given[0];
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return tools::fail(engine.error());
  const spach::ModelFacts& facts = engine->facts();
  std::printf("%s, %s, %s %s, built by %s\n", facts.name.c_str(), facts.precision.c_str(),
              spach::linked_flavour(), spach::linked_version().c_str(), facts.version.c_str());
  const spach::Result<spach::SelfTest> report = spach::self_test(*engine);
  if (!report) return tools::fail(report.error());
  std::printf("%zu golden images against PyTorch in FP32, in batches of", report->images);
  for (const int batch : report->batches) std::printf(" %d", batch);
  std::printf("\n\n");
  for (const spach::Comparison& output : report->outputs) print_output(output, report->images);
  std::printf("\n%s\n", report->passed() ? "PASSED" : "FAILED");
  return report->passed() ? 0 : 1;
}
