// How long a batch takes and how many images a second that is, with one context a thread.
// Measured around `Context::run`: copies to and from the GPU included, preprocessing not.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "common.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Plan {
  std::string folder = "model";
  int batch = 0;
  int threads = 1;
  int runs = 100;
};

// What one thread measured, or why it could not.
struct Measured {
  std::vector<double> milliseconds;
  std::string problem;
};

void measure(const spach::Engine& engine, const Plan& plan, Measured& measured) {
  spach::Result<spach::Context> context = engine.create_context();
  if (!context) {
    measured.problem = context.error().message;
    return;
  }
  const std::size_t bytes = static_cast<std::size_t>(plan.batch) * engine.facts().input.bytes();
  const std::vector<std::byte> input(
      bytes);  // zeros: what is in a picture does not change the time
  const int warm_up = std::max(1, plan.runs / 10);
  for (int i = -warm_up; i < plan.runs; ++i) {
    const Clock::time_point start = Clock::now();
    const spach::Result<spach::Outputs> outputs = context->run(input.data(), bytes, plan.batch);
    const std::chrono::duration<double, std::milli> took = Clock::now() - start;
    if (!outputs) {
      measured.problem = outputs.error().message;
      return;
    }
    if (i >= 0) measured.milliseconds.push_back(took.count());
  }
}

double percentile(const std::vector<double>& sorted, double share) {
  return sorted[static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1))];
}

int report(const Plan& plan, const std::vector<Measured>& threads, double seconds) {
  std::vector<double> all;
  for (const Measured& measured : threads) {
    if (!measured.problem.empty()) {
      std::fprintf(stderr, "Error: %s\n", measured.problem.c_str());
      return 3;
    }
    all.insert(all.end(), measured.milliseconds.begin(), measured.milliseconds.end());
  }
  std::sort(all.begin(), all.end());
  std::printf("batch %d, %d threads, %zu runs\n", plan.batch, plan.threads, all.size());
  std::printf("a batch: median %.3f ms, 95%% %.3f ms, 99%% %.3f ms, longest %.3f ms\n",
              percentile(all, 0.5), percentile(all, 0.95), percentile(all, 0.99), all.back());
  // Warm-up is part of the time here, and its images are counted.
  const int warm_up = std::max(1, plan.runs / 10) * plan.threads;
  const double images =
      static_cast<double>(plan.batch) * (static_cast<double>(all.size()) + warm_up);
  std::printf("together: %.1f images/s\n", images / seconds);
  return 0;
}

int benchmark(Plan plan) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(plan.folder);
  if (!engine) return tools::fail(engine.error());
  if (plan.batch == 0) plan.batch = engine->facts().batch.opt;
  std::vector<Measured> measured(static_cast<std::size_t>(plan.threads));
  std::vector<std::thread> threads;
  const Clock::time_point start = Clock::now();
  for (Measured& mine : measured)
    threads.emplace_back([&engine, &plan, &mine] { measure(*engine, plan, mine); });
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> took = Clock::now() - start;
  return report(plan, measured, took.count());
}

}  // namespace

int main(int argc, char** argv) {
  constexpr const char* kUsage = "spach_benchmark [-m FOLDER] [-b BATCH] [-t THREADS] [-n RUNS]";
  Plan plan;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 >= argc) return tools::usage(kUsage);
    if (name == "-m") {
      plan.folder = argv[i + 1];
      continue;
    }
    int* const number = name == "-b"   ? &plan.batch
                        : name == "-t" ? &plan.threads
                        : name == "-n" ? &plan.runs
                                       : nullptr;
    if (number == nullptr || (*number = tools::positive(argv[i + 1], 1000000)) == 0)
      return tools::usage(kUsage);
  }
  return benchmark(plan);
}
