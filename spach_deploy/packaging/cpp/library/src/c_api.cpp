#include <algorithm>
#include <cstdio>
#include <new>
#include <utility>

#include "guard.h"
#include "spach/spach.h"
#include "spach/spach_c.h"

struct spach_engine {
  spach::Engine engine;
};

struct spach_context {
  spach::Context context;
  std::size_t classes;
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

}  // namespace

int spach_engine_load(const char* folder, int device, spach_engine** engine, spach_error* error) {
  if (engine != nullptr) *engine = nullptr;
  return call(error, [&]() -> Status {
    if (folder == nullptr || engine == nullptr) return null_pointer();
    spach::Result<spach::Engine> loaded = spach::Engine::load(folder, device);
    if (!loaded) return loaded.error();
    *engine = new spach_engine{std::move(*loaded)};
    return Done{};
  });
}

void spach_engine_free(spach_engine* engine) {
  delete engine;
}

int spach_engine_model(const spach_engine* engine, spach_model* model, spach_error* error) {
  return call(error, [&]() -> Status {
    if (engine == nullptr || model == nullptr) return null_pointer();
    const spach::ModelFacts& facts = engine->engine.facts();
    *model = {facts.image_height, facts.image_width, facts.channels(),
              facts.classes(),    facts.batch.min,   facts.batch.max,
              facts.input.bytes(), facts.outputs.size()};
    return Done{};
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
    *passed = report && report->passed() ? 1 : 0;
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
    const auto classes = static_cast<std::size_t>(engine->engine.facts().classes());
    *context = new spach_context{std::move(*made), classes};
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

int spach_context_logits(spach_context* context, const void* input, size_t count, float* logits,
                         size_t logits_size, spach_error* error) {
  return call(error, [&]() -> Status {
    if (context == nullptr || input == nullptr || logits == nullptr) return null_pointer();
    const std::size_t classes = context->classes;  // divided, because a product could overflow
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
