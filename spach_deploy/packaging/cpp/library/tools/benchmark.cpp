// How long a batch takes and how many images a second that is, with one context a thread.
// Measured around `Context::run`: copies to and from the GPU included, preprocessing not. And how
// long it takes until the first answers, which the runtime cache shortens.

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
  spach::EngineOptions options;
};

// What one thread measured, or why it could not.
struct Measured {
  double first_milliseconds = 0;  // from the start to the first answer
  std::vector<double> milliseconds;
  std::string problem;
};

void measure(const spach::Engine& engine, const Plan& plan, Clock::time_point program,
             Measured& measured) {
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
    if (i == -warm_up)
      measured.first_milliseconds =
          std::chrono::duration<double, std::milli>(Clock::now() - program).count();
    if (i >= 0) measured.milliseconds.push_back(took.count());
  }
}

double percentile(const std::vector<double>& sorted, double share) {
  return sorted[static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1))];
}

int report(const Plan& plan, const std::vector<Measured>& threads, double seconds) {
  std::vector<double> all;
  double first = 0;
  for (const Measured& measured : threads) {
    if (!measured.problem.empty()) {
      std::fprintf(stderr, "Error: %s\n", measured.problem.c_str());
      return 3;
    }
    first = std::max(first, measured.first_milliseconds);
    all.insert(all.end(), measured.milliseconds.begin(), measured.milliseconds.end());
  }
  std::sort(all.begin(), all.end());
  std::printf("batch %d, %d threads, %zu runs\n", plan.batch, plan.threads, all.size());
  std::printf("a batch: median %.3f ms, 95%% %.3f ms, 99%% %.3f ms, longest %.3f ms\n",
              percentile(all, 0.5), percentile(all, 0.95), percentile(all, 0.99), all.back());
  std::printf("from the start to the first answers: %.0f ms\n", first);
  // Warm-up is part of the time here, and its images are counted.
  const int warm_up = std::max(1, plan.runs / 10) * plan.threads;
  const double images =
      static_cast<double>(plan.batch) * (static_cast<double>(all.size()) + warm_up);
  std::printf("together: %.1f images/s\n", images / seconds);
  return 0;
}

int benchmark(Plan plan) {
  const Clock::time_point program = Clock::now();
  const spach::Result<spach::Engine> engine =
      spach::Engine::load(tools::path_of(plan.folder), plan.options);
  if (!engine) return tools::fail(engine.error());
  if (plan.batch == 0) plan.batch = engine->facts().batch.opt;
  std::vector<Measured> measured(static_cast<std::size_t>(plan.threads));
  std::vector<std::thread> threads;
  const Clock::time_point start = Clock::now();
  for (Measured& mine : measured)
    threads.emplace_back(
        [&engine, &plan, program, &mine] { measure(*engine, plan, program, mine); });
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> took = Clock::now() - start;
  return report(plan, measured, took.count());
}

}  // namespace

int main(int argc, char** argv) {
  constexpr const char* kUsage =
      "spach_benchmark [-m FOLDER] [-b BATCH] [-t THREADS] [-n RUNS] [-c CACHE|none] [-g]\n"
      "  [-s lazy|eager|none]";
  Plan plan;
  const std::vector<std::string> given = tools::arguments(argc, argv);
  for (std::size_t i = 0; i < given.size(); ++i) {
    const std::string& name = given[i];
    if (name == "-g") {
      plan.options.cuda_graphs = true;
      continue;
    }
    if (++i >= given.size()) return tools::usage(kUsage);
    const std::string& value = given[i];
    if (name == "-m") {
      plan.folder = value;
    } else if (name == "-c") {
      plan.options.runtime_cache = value != "none";
      if (value != "none") plan.options.runtime_cache_file = tools::path_of(value);
    } else if (name == "-s" && (value == "lazy" || value == "eager" || value == "none")) {
      plan.options.specialization = value == "lazy"    ? spach::Specialization::lazy
                                    : value == "eager" ? spach::Specialization::eager
                                                       : spach::Specialization::none;
    } else {
      int* const number = name == "-b"   ? &plan.batch
                          : name == "-t" ? &plan.threads
                          : name == "-n" ? &plan.runs
                                         : nullptr;
      if (number == nullptr || (*number = tools::positive(value, 1000000)) == 0)
        return tools::usage(kUsage);
    }
  }
  return benchmark(plan);
}
