// What tests ask the library, one subcommand a question; answers on stdout.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cuda_double.h"
#include "half.h"
#include "sha256.h"
#include "spach/spach.h"

namespace {

using Bytes = std::vector<std::byte>;

Bytes read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> content((std::istreambuf_iterator<char>(file)), {});
  Bytes bytes(content.size());
  if (!bytes.empty()) std::memcpy(bytes.data(), content.data(), content.size());
  return bytes;
}

void write(const std::string& path, const void* data, std::size_t size) {
  std::ofstream(path, std::ios::binary)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
}

int refused(const spach::Error& error) {
  std::printf("%s: %s\n", spach::name_of(error.code), error.message.c_str());
  return 1;
}

spach::Result<spach::ModelFacts> facts_of(const std::string& folder) {
  const Bytes text = read(folder + "/model.txt");
  return spach::parse_facts({reinterpret_cast<const char*>(text.data()), text.size()});
}

// sha256 FILE
int hash(const std::string& path) {
  const Bytes content = read(path);
  std::printf("%s\n", spach::sha256(content.data(), content.size()).c_str());
  return 0;
}

// half OUT: every half as float32, then as half again; and FLOATS as half.
int halves(const std::string& in, const std::string& out) {
  const Bytes content = read(in);
  std::vector<std::uint16_t> results;
  std::vector<float> floats;
  for (std::uint32_t i = 0; i < 65536; ++i)
    floats.push_back(spach::float_from_half(static_cast<std::uint16_t>(i)));
  for (std::size_t at = 0; at + 4 <= content.size(); at += 4) {
    float value;
    std::memcpy(&value, content.data() + at, 4);
    results.push_back(spach::half_from_float(value));
  }
  write(out + ".f32", floats.data(), 4 * floats.size());
  write(out + ".f16", results.data(), 2 * results.size());
  return 0;
}

// preprocess MODEL RGB WIDTH HEIGHT STRIDE OUT [CHANNELS]: pixels, and the model's input.
int preprocess(char** arguments, int count) {
  const spach::Result<spach::ModelFacts> facts = facts_of(arguments[0]);
  if (!facts) return refused(facts.error());
  const Bytes rgb = read(arguments[1]);
  const spach::Image image{reinterpret_cast<const std::uint8_t*>(rgb.data()),
                           std::atoi(arguments[2]), std::atoi(arguments[3]),
                           static_cast<std::size_t>(std::atoi(arguments[4])),
                           count > 6 ? std::atoi(arguments[6]) : 3};
  const spach::Preprocessor preprocessor(*facts);
  const auto pixels = preprocessor.pixels(image);
  if (!pixels) return refused(pixels.error());
  Bytes input(facts->input.bytes());
  const spach::Status status = preprocessor.write(image, input.data());
  if (!status) return refused(status.error());
  write(std::string(arguments[5]) + ".pixels", pixels->data(), pixels->size());
  write(std::string(arguments[5]) + ".input", input.data(), input.size());
  return 0;
}

// load MODEL [DEVICE]
int load(const std::string& folder, int device) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder, device);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  std::printf("loaded\n");
  return 0;
}

// run MODEL INPUT BATCH OUT: every output, one file each.
int run(const std::string& folder, const std::string& in, int batch, const std::string& out) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const Bytes input = read(in);
  const auto outputs = context->run(input.data(), input.size(), batch);
  if (!outputs) return refused(outputs.error());
  for (const spach::Output& output : *outputs)
    write(out + "." + output.tensor.name, output.data.data(), output.data.size());
  return 0;
}

// logits MODEL INPUT COUNT OUT
int logits(const std::string& folder, const std::string& in, std::size_t count,
           const std::string& out) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const Bytes input = read(in);
  const auto values = context->logits(input.data(), count);
  if (!values) return refused(values.error());
  write(out, values->data(), 4 * values->size());
  return 0;
}

// output MODEL NAME INPUT COUNT OUT, and the model's classes.
int output(const std::string& folder, const std::string& name, const std::string& in,
           std::size_t count, const std::string& out) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const Bytes input = read(in);
  std::printf("%d classes\n", engine->facts().classes());
  const auto values = context->output(name, input.data(), count);
  if (!values) return refused(values.error());
  write(out, values->data(), 4 * values->size());
  return 0;
}

// enqueue MODEL INPUT BATCH OUT: from and to device memory on a stream of our own; logits.
int enqueue(const std::string& folder, const std::string& in, int batch, const std::string& out) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const spach::ModelFacts& facts = engine->facts();
  const Bytes input = read(in);
  const auto images = static_cast<std::size_t>(std::max(batch, 1));  // a bad one is to be refused

  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  void* device_input = nullptr;
  cudaMalloc(&device_input, input.size());
  cudaMemcpyAsync(device_input, input.data(), input.size(), cudaMemcpyHostToDevice, stream);
  std::vector<void*> outputs;
  for (const spach::OutputFacts& output : facts.outputs) {
    outputs.push_back(nullptr);
    cudaMalloc(&outputs.back(), images * output.tensor.bytes());
  }
  const spach::Status status =
      context->enqueue(device_input, batch, outputs.data(), outputs.size(), stream);
  Bytes answer(images * facts.outputs.front().tensor.bytes());
  if (status)
    cudaMemcpyAsync(answer.data(), outputs.front(), answer.size(), cudaMemcpyDeviceToHost, stream);
  cudaStreamSynchronize(stream);
  for (void* output : outputs) cudaFree(output);
  cudaFree(device_input);
  cudaStreamDestroy(stream);
  if (!status) return refused(status.error());
  write(out, answer.data(), answer.size());
  return 0;
}

// Options from NAME=VALUE words: cache, cuda_graphs, specialization, threads.
spach::EngineOptions options_of(char** words, int count) {
  spach::EngineOptions options;
  for (int i = 0; i < count; ++i) {
    const std::string word = words[i];
    const std::string name = word.substr(0, word.find('='));
    const std::string value = word.substr(name.size() + 1);
    if (name == "cache") {
      options.runtime_cache = value != "none";
      if (value != "none" && value != "default") options.runtime_cache_file = value;
    }
    if (name == "cuda_graphs") options.cuda_graphs = value == "1";
    if (name == "specialization")
      options.specialization = static_cast<spach::Specialization>(std::atoi(value.c_str()));
    if (name == "threads") options.threads = std::atoi(value.c_str());
  }
  return options;
}

void print_log() {
  const auto print = [](spach::Severity severity, std::string_view message) {
    std::printf("%s: %s\n", spach::name_of(severity), std::string(message).c_str());
  };
  if (!spach::set_log(print, spach::Severity::info)) std::abort();
}

// warm MODEL BATCHES OPTION...: what is said; each of BATCHES (1,4) is run once, none: warm_up,
// save: what was compiled is saved on request; wait: for a line on stdin.
int warm(const std::string& folder, const std::string& batches, char** words, int count) {
  print_log();
  const auto engine = spach::Engine::load(std::filesystem::path(folder), options_of(words, count));
  if (!engine) return refused(engine.error());
  std::printf("file: %s\n", engine->runtime_cache_file().string().c_str());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  std::string left = batches;
  while (!left.empty() && left != "none") {
    const std::string word = left.substr(0, left.find(','));
    left.erase(0, word.size() + 1);
    spach::Status status = spach::Done{};
    if (word == "save") {
      status = engine->save_runtime_cache();
    } else if (word == "wait") {
      std::printf("waits\n");
      std::fflush(stdout);
      std::getchar();
    } else {
      const int batch = std::atoi(word.c_str());
      const Bytes input(static_cast<std::size_t>(batch) * engine->facts().input.bytes());
      const auto outputs = context->run(input.data(), input.size(), batch);
      if (!outputs) status = outputs.error();
    }
    if (!status) return refused(status.error());
  }
  if (batches == "none")
    if (const spach::Status status = context->warm_up(); !status) return refused(status.error());
  std::printf("done\n");
  return 0;
}

// memory MODEL INPUT BATCH OUT: the engine from memory and its self-test; its logits.
int memory(const std::string& folder, const std::string& in, int batch, const std::string& out) {
  const auto engine = [&]() -> spach::Result<spach::Engine> {
    const Bytes text = read(folder + "/model.txt"), plan = read(folder + "/engine.plan");
    const Bytes labels = read(folder + "/labels.txt");
    spach::ModelBytes model;
    model.text = {reinterpret_cast<const char*>(text.data()), text.size()};
    model.plan = plan.data();
    model.plan_bytes = plan.size();
    model.labels = {reinterpret_cast<const char*>(labels.data()), labels.size()};
    return spach::Engine::load(model);  // which keeps nothing of what is gone now
  }();
  if (!engine) return refused(engine.error());
  const auto alone = spach::self_test(*engine);
  std::printf("%s\n", alone ? "?" : alone.error().message.c_str());
  const Bytes golden = read(folder + "/golden.bin");
  const auto pack = spach::parse_golden(golden.data(), golden.size(), engine->facts());
  if (!pack) return refused(pack.error());
  const auto report = spach::self_test(*engine, *pack);
  if (!report) return refused(report.error());
  std::printf("passed %d, labels %zu, folder '%s'\n", report->passed() ? 1 : 0,
              engine->labels().size(), engine->folder().c_str());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const Bytes input = read(in);
  const auto outputs = context->run(input.data(), input.size(), batch);
  if (!outputs) return refused(outputs.error());
  write(out, outputs->front().data.data(), outputs->front().data.size());
  return 0;
}

// flight MODEL INPUT COUNT OUT: images one by one, two at once, in two slots. The double does its
// work when it is waited for, so what is written to a slot after `submit` would show.
int flight(const std::string& folder, const std::string& in, std::size_t count,
           const std::string& out) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const Bytes input = read(in);
  const std::size_t bytes = engine->facts().input.bytes();
  Bytes logits;
  const void* kept[2] = {};
  const auto collect = [&](std::size_t slot) -> spach::Status {
    const auto views = context->wait(slot);
    if (!views) return views.error();
    const spach::OutputView& view = views->front();
    if (kept[slot] != nullptr && kept[slot] != view.data)
      return spach::Error{spach::ErrorCode::engine, "the outputs have moved"};
    if (!spach_double::is_pinned_memory(view.data, view.bytes))
      return spach::Error{spach::ErrorCode::engine, "the outputs are not pinned"};
    kept[slot] = view.data;
    const auto* from = static_cast<const std::byte*>(view.data);
    logits.insert(logits.end(), from, from + view.bytes);
    return spach::Done{};
  };
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t slot = i % 2;
    if (i >= 2)
      if (const spach::Status status = collect(slot); !status) return refused(status.error());
    const spach::Result<void*> to = context->input(slot);
    if (!to) return refused(to.error());
    if (!spach_double::is_pinned_memory(*to, bytes)) return 3;
    std::memcpy(*to, input.data() + i * bytes, bytes);
    if (const spach::Status status = context->submit(slot, 1); !status)
      return refused(status.error());
    if (context->input(slot) || context->submit(slot, 1)) return 4;  // it is in flight
    if (i == 1) {  // a call that waits comes between and disturbs nothing
      const auto values = context->logits(input.data(), 1);
      if (!values) return refused(values.error());
    }
  }
  for (std::size_t i = std::max(count, std::size_t{2}) - 2; i < count; ++i)
    if (const spach::Status status = collect(i % 2); !status) return refused(status.error());
  write(out, logits.data(), logits.size());
  for (const std::size_t slot : {std::size_t{5}, spach::Context::kSlots}) {
    const auto never = context->wait(slot);
    std::printf("%s\n", never ? "?" : never.error().message.c_str());
  }
  return 0;
}

// late MODEL INPUT OUT: a slot is overwritten between `submit` and `wait`, as callers must not do.
int late(const std::string& folder, const std::string& in, const std::string& out) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const Bytes input = read(in);
  const std::size_t bytes = engine->facts().input.bytes();
  const spach::Result<void*> to = context->input(0);
  if (!to) return refused(to.error());
  std::memcpy(*to, input.data(), bytes);
  if (const spach::Status status = context->submit(0, 1); !status) return refused(status.error());
  std::memcpy(*to, input.data() + bytes, bytes);
  const auto views = context->wait(0);
  if (!views) return refused(views.error());
  write(out, views->front().data, views->front().bytes);
  return 0;
}

// pictures MODEL RGB WIDTH HEIGHT COUNT THREADS OUT: the inputs of COUNT pictures of one size.
int pictures(char** a) {
  const spach::Result<spach::ModelFacts> facts = facts_of(a[0]);
  if (!facts) return refused(facts.error());
  const Bytes rgb = read(a[1]);
  const int width = std::atoi(a[2]), height = std::atoi(a[3]);
  const auto count = static_cast<std::size_t>(std::atoi(a[4]));
  std::vector<spach::Image> images;
  for (std::size_t i = 0; i < count; ++i) {
    const auto* pixels = reinterpret_cast<const std::uint8_t*>(rgb.data());
    const std::size_t at =
        i * 3 * static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    images.push_back({at < rgb.size() ? pixels + at : nullptr, width, height});
  }
  Bytes input(count * facts->input.bytes());
  const spach::Status status =
      spach::Preprocessor(*facts).write(images.data(), count, input.data(), std::atoi(a[5]));
  if (!status) return refused(status.error());
  write(a[6], input.data(), input.size());
  return 0;
}

// log MODEL: TensorRT's own words through the callback, from a call that fails; then nothing more.
int log_of(const std::string& folder) {
  print_log();
  const auto first = spach::Engine::load(folder);
  const auto thrower = [](spach::Severity, std::string_view) { throw 1; };
  if (!spach::set_log(thrower, spach::Severity::verbose)) return 2;
  const auto second = spach::Engine::load(folder);
  if (!spach::set_log({})) return 2;
  const auto third = spach::Engine::load(folder);
  std::printf("%d %d %d\n", first ? 1 : 0, second ? 1 : 0, third ? 1 : 0);
  return 0;
}

// threads MODEL INPUT COUNT THREADS ROUNDS: each thread runs the images in an order of its own, in
// batches of changing sizes, and must get for each the logits that one thread alone got.
int threads(const std::string& folder, const std::string& in, std::size_t count,
            std::size_t workers, int rounds) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  const Bytes input = read(in);
  const std::size_t bytes = engine->facts().input.bytes();
  const auto classes = static_cast<std::size_t>(engine->facts().classes());
  std::vector<float> alone;
  {
    spach::Result<spach::Context> context = engine->create_context();
    if (!context) return refused(context.error());
    auto values = context->logits(input.data(), count);
    if (!values) return refused(values.error());
    alone = *values;
  }
  std::atomic<int> wrong{0}, answered{0};
  std::vector<std::thread> pool;
  for (std::size_t me = 0; me < workers; ++me) {
    pool.emplace_back([&, me] {
      spach::Result<spach::Context> context = engine->create_context();
      if (!context) return void(++wrong);
      for (int round = 0; round < rounds; ++round) {
        const std::size_t size = 1 + (me + static_cast<std::size_t>(round)) % 4;
        std::vector<std::size_t> which;
        Bytes mine;
        for (std::size_t i = 0; i < size; ++i) {
          which.push_back((me * 3 + i * 5 + static_cast<std::size_t>(round)) % count);
          const auto from = input.begin() + static_cast<std::ptrdiff_t>(which.back() * bytes);
          mine.insert(mine.end(), from, from + static_cast<std::ptrdiff_t>(bytes));
        }
        const auto values = context->logits(mine.data(), size);
        if (!values) return void(++wrong);
        for (std::size_t i = 0; i < size; ++i) {
          ++answered;
          for (std::size_t c = 0; c < classes; ++c) {
            const float difference = (*values)[i * classes + c] - alone[which[i] * classes + c];
            if (!(difference < 1e-3f && difference > -1e-3f)) return void(++wrong);
          }
        }
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  std::printf("%d answered, %d wrong\n", answered.load(), wrong.load());
  return wrong.load() == 0 ? 0 : 1;
}

// shared MODEL INPUT: one context, many threads. Each call answers or says that it is in use.
int shared(const std::string& folder, const std::string& in) {
  const spach::Result<spach::Engine> engine = spach::Engine::load(folder);
  if (!engine) return refused(engine.error());
  spach::Result<spach::Context> context = engine->create_context();
  if (!context) return refused(context.error());
  const Bytes input = read(in);
  std::atomic<int> fine{0}, busy{0}, other{0};
  std::vector<std::thread> pool;
  for (int i = 0; i < 8; ++i) {
    pool.emplace_back([&] {
      for (int round = 0; round < 10000 && (busy < 10 || fine < 10); ++round) {  // until they met
        const auto values = context->logits(input.data(), 1);
        if (values) {
          ++fine;
        } else if (values.error().code == spach::ErrorCode::busy) {
          ++busy;
        } else {
          ++other;
        }
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  std::printf("%d other\n", other.load());
  return fine > 0 && busy > 0 && other == 0 ? 0 : 1;
}

// lifetime MODEL INPUT: a context outlives its engine, moves, and a moved-from one only refuses.
int lifetime(const std::string& folder, const std::string& in) {
  const Bytes input = read(in);
  spach::Result<spach::Context> context = [&]() -> spach::Result<spach::Context> {
    spach::Result<spach::Engine> engine = spach::Engine::load(folder);
    if (!engine) return engine.error();
    const spach::Engine copy = *engine;
    return copy.create_context();
  }();
  if (!context) return refused(context.error());
  spach::Context moved = std::move(*context);
  const auto values = moved.logits(input.data(), 1);
  const auto empty = context->logits(input.data(), 1);
  if (!values || empty) return 1;
  std::printf("%s\n", empty.error().message.c_str());
  return 0;
}

// folders LIST: loads every model folder of a list and tests itself if it can. Counts.
int folders(const std::string& list) {
  std::ifstream names(list);
  int total = 0, loaded = 0, tested = 0;
  for (std::string path; std::getline(names, path); ++total) {
    const spach::Result<spach::Engine> engine = spach::Engine::load(path);
    if (!engine) {
      if (engine.error().message.empty()) return 1;
      continue;
    }
    ++loaded;
    if (spach::self_test(*engine)) ++tested;
  }
  std::printf("%d folders, %d loaded, %d tested\n", total, loaded, tested);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  char** a = argv + 2;
  const int n = argc - 2;
  if (what == "sha256" && n == 1) return hash(a[0]);
  if (what == "half" && n == 2) return halves(a[0], a[1]);
  if (what == "preprocess" && (n == 6 || n == 7)) return preprocess(a, n);
  if (what == "load" && n == 2) return load(a[0], std::atoi(a[1]));
  if (what == "run" && n == 4) return run(a[0], a[1], std::atoi(a[2]), a[3]);
  if (what == "enqueue" && n == 4) return enqueue(a[0], a[1], std::atoi(a[2]), a[3]);
  if (what == "logits" && n == 4)
    return logits(a[0], a[1], static_cast<std::size_t>(std::atoi(a[2])), a[3]);
  if (what == "output" && n == 5)
    return output(a[0], a[1], a[2], static_cast<std::size_t>(std::atoi(a[3])), a[4]);
  if (what == "warm" && n >= 2) return warm(a[0], a[1], a + 2, n - 2);
  if (what == "memory" && n == 4) return memory(a[0], a[1], std::atoi(a[2]), a[3]);
  if (what == "flight" && n == 4)
    return flight(a[0], a[1], static_cast<std::size_t>(std::atoi(a[2])), a[3]);
  if (what == "late" && n == 3) return late(a[0], a[1], a[2]);
  if (what == "pictures" && n == 7) return pictures(a);
  if (what == "log" && n == 1) return log_of(a[0]);
  if (what == "threads" && n == 5)
    return threads(a[0], a[1], static_cast<std::size_t>(std::atoi(a[2])),
                   static_cast<std::size_t>(std::atoi(a[3])), std::atoi(a[4]));
  if (what == "shared" && n == 2) return shared(a[0], a[1]);
  if (what == "lifetime" && n == 2) return lifetime(a[0], a[1]);
  if (what == "folders" && n == 1) return folders(a[0]);
  std::fprintf(stderr, "unknown question\n");
  return 2;
}
