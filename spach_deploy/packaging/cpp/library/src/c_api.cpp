#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "files.h"
#include "guard.h"
#include "spach/spach.h"
#include "spach/spach_c.h"

struct spach_engine {
  spach::Engine engine;
};

struct spach_context {
  spach::Context context;
  spach::Engine engine;
};

namespace {

using spach::Done;
using spach::Error;
using spach::ErrorCode;
using spach::Status;

int finish(const Status& status, spach_error* error) noexcept {
  const int code = status ? 0 : static_cast<int>(status.error().code);
  if (error == nullptr) return code;
  error->code = code;
  error->message[0] = '\0';
  if (code != 0) {
    std::snprintf(error->message, sizeof error->message, "%s. %s",
                  spach::name_of(status.error().code), status.error().message.c_str());
  }
  return code;
}

template <typename Body>
int call(spach_error* error, Body body) noexcept {
  return finish(spach::guarded([&]() -> Status { return body(); }), error);
}

Error null_pointer() {
  return Error{ErrorCode::bad_argument, "A null pointer was given."};
}

Error bad(const char* what) {
  return Error{ErrorCode::bad_argument, what};
}

// The numbers of spach_c.h are those of the enumerations.
static_assert(SPACH_INT64 == static_cast<int>(spach::DType::int64));
static_assert(SPACH_TOP_INDICES == static_cast<int>(spach::Role::top_indices));
static_assert(SPACH_NONE == static_cast<int>(spach::Specialization::none));
static_assert(SPACH_VERBOSE == static_cast<int>(spach::Severity::verbose));

spach::Result<spach::EngineOptions> options_of(const spach_options* given) {
  spach::EngineOptions options;
  if (given == nullptr) return options;
  if (given->size != sizeof(spach_options)) return bad("Options begin with SPACH_OPTIONS_DEFAULT.");
  if (given->specialization < SPACH_LAZY || given->specialization > SPACH_NONE)
    return bad("The specialization is none of SPACH_LAZY, SPACH_EAGER and SPACH_NONE.");
  options.device = given->device;
  options.runtime_cache = given->runtime_cache != 0;
  if (given->runtime_cache_file != nullptr)
    options.runtime_cache_file = spach::path_of(given->runtime_cache_file);
  options.cuda_graphs = given->cuda_graphs != 0;
  options.specialization = static_cast<spach::Specialization>(given->specialization);
  options.threads = given->threads;
  return options;
}

Status hand_out(spach::Result<spach::Engine> loaded, spach_engine** engine) {
  if (!loaded) return loaded.error();
  *engine = new spach_engine{std::move(*loaded)};
  return Done{};
}

spach_tensor tensor_of(const spach::TensorFacts& facts, spach::Role role) {
  spach_tensor tensor{};
  tensor.name = facts.name.c_str();
  tensor.dtype = static_cast<int>(facts.dtype);
  tensor.role = static_cast<int>(role);
  tensor.rank = static_cast<int>(facts.shape.size());
  std::copy(facts.shape.begin(), facts.shape.end(), tensor.shape);
  tensor.items = facts.items();
  tensor.bytes = facts.bytes();
  return tensor;
}

std::vector<spach::Image> images_of(const spach_image* given, std::size_t count) {
  std::vector<spach::Image> images;
  for (std::size_t i = 0; i < count; ++i)
    images.push_back(
        {given[i].pixels, given[i].width, given[i].height, given[i].stride, given[i].channels});
  return images;
}

int passed_of(const spach::Result<spach::SelfTest>& report) {
  return report && report->passed() ? 1 : 0;
}

}  // namespace

int spach_set_log(spach_log callback, void* user, int most, spach_error* error) {
  return call(error, [&]() -> Status {
    if (callback == nullptr) return spach::set_log({});
    if (most < SPACH_INTERNAL_ERROR || most > SPACH_VERBOSE)
      return bad("`most` is no severity, from SPACH_INTERNAL_ERROR to SPACH_VERBOSE.");
    const auto pass_on = [callback, user](spach::Severity severity, std::string_view message) {
      callback(user, static_cast<int>(severity), std::string(message).c_str());
    };
    return spach::set_log(pass_on, static_cast<spach::Severity>(most));
  });
}

int spach_engine_load(const char* folder, int device, spach_engine** engine, spach_error* error) {
  if (engine != nullptr) *engine = nullptr;
  return call(error, [&]() -> Status {
    if (folder == nullptr || engine == nullptr) return null_pointer();
    return hand_out(spach::Engine::load(folder, device), engine);
  });
}

int spach_engine_load_with(const char* folder, const spach_options* options, spach_engine** engine,
                           spach_error* error) {
  if (engine != nullptr) *engine = nullptr;
  return call(error, [&]() -> Status {
    if (folder == nullptr || options == nullptr || engine == nullptr) return null_pointer();
    const auto chosen = options_of(options);
    if (!chosen) return chosen.error();
    return hand_out(spach::Engine::load(spach::path_of(folder), *chosen), engine);
  });
}

int spach_engine_load_memory(const char* text, size_t text_size, const void* plan, size_t plan_size,
                             const char* labels, size_t labels_size, const spach_options* options,
                             spach_engine** engine, spach_error* error) {
  if (engine != nullptr) *engine = nullptr;
  return call(error, [&]() -> Status {
    if (text == nullptr || plan == nullptr || engine == nullptr) return null_pointer();
    const auto chosen = options_of(options);
    if (!chosen) return chosen.error();
    spach::ModelBytes model;
    model.text = {text, text_size};
    model.plan = plan;
    model.plan_bytes = plan_size;
    if (labels != nullptr) model.labels = {labels, labels_size};
    return hand_out(spach::Engine::load(model, *chosen), engine);
  });
}

void spach_engine_free(spach_engine* engine) {
  delete engine;
}

int spach_engine_model(const spach_engine* engine, spach_model* model, spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr || model == nullptr) return null_pointer();
    const spach::ModelFacts& facts = engine->engine.facts();
    *model = {facts.image_height, facts.image_width, facts.channels(),    facts.classes(),
              facts.batch.min,    facts.batch.max,   facts.input.bytes(), facts.outputs.size()};
    return Done{};
  });
}

int spach_engine_batches(const spach_engine* engine, int* min, int* opt, int* max,
                         spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr) return null_pointer();
    const spach::BatchFacts& batch = engine->engine.facts().batch;
    if (min != nullptr) *min = batch.min;
    if (opt != nullptr) *opt = batch.opt;
    if (max != nullptr) *max = batch.max;
    return Done{};
  });
}

int spach_engine_input(const spach_engine* engine, spach_tensor* tensor, spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr || tensor == nullptr) return null_pointer();
    *tensor = tensor_of(engine->engine.facts().input, spach::Role::other);
    return Done{};
  });
}

int spach_engine_output(const spach_engine* engine, size_t index, spach_tensor* tensor,
                        spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr || tensor == nullptr) return null_pointer();
    const std::vector<spach::OutputFacts>& outputs = engine->engine.facts().outputs;
    if (index >= outputs.size()) return bad("The model has no such output.");
    *tensor = tensor_of(outputs[index].tensor, outputs[index].role);
    return Done{};
  });
}

int spach_engine_output_named(const spach_engine* engine, const char* name, spach_tensor* tensor,
                              spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr || name == nullptr || tensor == nullptr) return null_pointer();
    const spach::OutputFacts* output = engine->engine.facts().find(std::string(name));
    if (output == nullptr) return bad("The model has no such output.");
    *tensor = tensor_of(output->tensor, output->role);
    return Done{};
  });
}

int spach_engine_save_runtime_cache(const spach_engine* engine, spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr) return null_pointer();
    return engine->engine.save_runtime_cache();
  });
}

const char* spach_engine_label(const spach_engine* engine, int index) {
  if (engine == nullptr || index < 0) return "";
  const auto& labels = engine->engine.labels();
  const auto at = static_cast<std::size_t>(index);
  return at < labels.size() ? labels[at].c_str() : "";
}

int spach_engine_self_test(const spach_engine* engine, int* passed, spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr || passed == nullptr) return null_pointer();
    spach::Result<spach::SelfTest> report = spach::self_test(engine->engine);
    *passed = passed_of(report);
    if (!report) return report.error();
    return Done{};
  });
}

int spach_engine_self_test_golden(const spach_engine* engine, const void* golden, size_t size,
                                  int* passed, spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr || golden == nullptr || passed == nullptr) return null_pointer();
    *passed = 0;
    const spach::ModelFacts& facts = engine->engine.facts();
    const auto* bytes = static_cast<const std::byte*>(golden);
    Status status = spach::check_file("golden.bin", bytes, size, facts.golden);
    if (!status) return status;
    const auto pack = spach::parse_golden(bytes, size, facts);
    if (!pack) return pack.error();
    const spach::Result<spach::SelfTest> report = spach::self_test(engine->engine, *pack);
    *passed = passed_of(report);
    if (!report) return report.error();
    return Done{};
  });
}

int spach_context_create(const spach_engine* engine, spach_context** context, spach_error* error) {
  if (context != nullptr) *context = nullptr;
  return call(error, [&]() -> Status {
    if (engine == nullptr || context == nullptr) return null_pointer();
    spach::Result<spach::Context> made = engine->engine.create_context();
    if (!made) return made.error();
    *context = new spach_context{std::move(*made), engine->engine};
    return Done{};
  });
}

void spach_context_free(spach_context* context) {
  delete context;
}

int spach_context_classify_rgb8(spach_context* context, const uint8_t* rgb, int width, int height,
                                size_t stride, size_t k, spach_prediction* predictions,
                                size_t* found, spach_error* error) {
  if (found != nullptr) *found = 0;
  return call(error, [&]() -> Status {
    if (context == nullptr || rgb == nullptr || predictions == nullptr) return null_pointer();
    const spach::Image image{rgb, width, height, stride};
    const auto ranked = context->context.classify(&image, 1, k);
    if (!ranked) return ranked.error();
    const std::vector<spach::Prediction>& best = ranked->front();
    for (std::size_t i = 0; i < best.size(); ++i)
      predictions[i] = {best[i].index, best[i].logit, best[i].probability};
    if (found != nullptr) *found = best.size();
    return Done{};
  });
}

int spach_context_classify(spach_context* context, const spach_image* images, size_t count,
                           size_t k, spach_prediction* predictions, size_t* found,
                           spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr || images == nullptr || predictions == nullptr) return null_pointer();
    const std::vector<spach::Image> pictures = images_of(images, count);
    const auto ranked = context->context.classify(pictures.data(), count, k);
    if (!ranked) return ranked.error();
    for (std::size_t i = 0; i < count; ++i) {
      const std::vector<spach::Prediction>& best = (*ranked)[i];
      for (std::size_t rank = 0; rank < best.size(); ++rank)
        predictions[i * k + rank] = {best[rank].index, best[rank].logit, best[rank].probability};
      if (found != nullptr) found[i] = best.size();
    }
    return Done{};
  });
}

int spach_context_run(spach_context* context, const void* input, size_t input_bytes, int batch,
                      const spach_buffer* outputs, size_t output_count, spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr || (outputs == nullptr && output_count > 0)) return null_pointer();
    const spach::ModelFacts& facts = context->engine.facts();
    std::vector<std::size_t> which;  // asked before anything runs
    for (std::size_t i = 0; i < output_count; ++i) {
      if (outputs[i].name == nullptr || outputs[i].data == nullptr) return null_pointer();
      const spach::OutputFacts* output = facts.find(std::string(outputs[i].name));
      if (output == nullptr) return bad("The model has no such output.");
      const std::size_t bytes = output->tensor.bytes();
      if (batch < 1 || outputs[i].bytes % bytes != 0 ||
          outputs[i].bytes / bytes != static_cast<std::size_t>(batch))
        return bad("A buffer has not room for just the batch.");
      which.push_back(static_cast<std::size_t>(output - facts.outputs.data()));
    }
    const auto results = context->context.run(input, input_bytes, batch);
    if (!results) return results.error();
    for (std::size_t i = 0; i < output_count; ++i)
      std::memcpy(outputs[i].data, (*results)[which[i]].data.data(), outputs[i].bytes);
    return Done{};
  });
}

int spach_context_preprocess(spach_context* context, const spach_image* images, size_t count,
                             void* destination, spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr || images == nullptr || destination == nullptr) return null_pointer();
    const std::vector<spach::Image> pictures = images_of(images, count);
    return context->context.preprocess(pictures.data(), count, destination);
  });
}

int spach_context_logits(spach_context* context, const void* input, size_t count, float* logits,
                         size_t logits_size, spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr || input == nullptr || logits == nullptr) return null_pointer();
    // Divided, because a product could overflow.
    const auto classes = static_cast<std::size_t>(context->engine.facts().classes());
    if (classes == 0) return Error{ErrorCode::bad_argument, "The model has no logits."};
    if (count == 0 || logits_size % classes != 0 || logits_size / classes != count) {
      return Error{ErrorCode::bad_argument, "`logits` has not room for just `count` images."};
    }
    const auto values = context->context.logits(input, count);
    if (!values) return values.error();
    std::copy(values->begin(), values->end(), logits);
    return Done{};
  });
}

int spach_context_output(spach_context* context, const char* name, const void* input, size_t count,
                         float* values, size_t values_size, spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr || name == nullptr || input == nullptr || values == nullptr)
      return null_pointer();
    const auto found = context->context.output(name, input, count);
    if (!found) return found.error();
    if (found->size() != values_size)
      return Error{ErrorCode::bad_argument, "`values` has not room for just `count` images."};
    std::copy(found->begin(), found->end(), values);
    return Done{};
  });
}

int spach_context_enqueue(spach_context* context, const void* device_input, int batch,
                          void* const* device_outputs, size_t output_count, void* stream,
                          spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr) return null_pointer();
    return context->context.enqueue(device_input, batch, device_outputs, output_count,
                                    static_cast<CUstream_st*>(stream));
  });
}

int spach_context_input(spach_context* context, size_t slot, void** input, size_t* bytes,
                        spach_error* error) {
  if (input != nullptr) *input = nullptr;
  return call(error, [&]() -> Status {
    if (context == nullptr || input == nullptr) return null_pointer();
    const spach::Result<void*> memory = context->context.input(slot);
    if (!memory) return memory.error();
    *input = *memory;
    const spach::ModelFacts& facts = context->engine.facts();
    if (bytes != nullptr) *bytes = static_cast<std::size_t>(facts.batch.max) * facts.input.bytes();
    return Done{};
  });
}

int spach_context_submit(spach_context* context, size_t slot, int batch, spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr) return null_pointer();
    return context->context.submit(slot, batch);
  });
}

int spach_context_wait(spach_context* context, size_t slot, spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr) return null_pointer();
    const auto views = context->context.wait(slot);
    if (!views) return views.error();
    return Done{};
  });
}

int spach_context_waited(spach_context* context, size_t slot, const char* name, const void** data,
                         size_t* bytes, spach_error* error) {
  if (data != nullptr) *data = nullptr;
  return call(error, [&]() -> Status {
    if (context == nullptr || name == nullptr || data == nullptr) return null_pointer();
    const auto views = context->context.wait(slot);  // at once, where it was waited for
    if (!views) return views.error();
    for (const spach::OutputView& view : *views) {
      if (view.tensor.name != name) continue;
      *data = view.data;
      if (bytes != nullptr) *bytes = view.bytes;
      return Done{};
    }
    return bad("The model has no such output.");
  });
}

int spach_context_warm_up(spach_context* context, const int* batches, size_t count,
                          spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr) return null_pointer();
    if (batches == nullptr) return context->context.warm_up();
    return context->context.warm_up(std::vector<int>(batches, batches + count));
  });
}
