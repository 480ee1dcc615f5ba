/* from_c MODEL CACHE: the C API from C, all of it. Prints what it found. */
#include <spach/spach_c.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 2

static int fail(const char* what, const spach_error* error) {
  printf("%s: %d %s\n", what, error->code, error->message);
  return 1;
}

static void count_messages(void* user, int severity, const char* message) {
  if (severity <= SPACH_INFO && message[0] != 0) ++*(int*)user;
}

static char* content_of(const char* folder, const char* name, size_t* size) {
  char path[1024];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE* file = fopen(path, "rb");
  if (file == NULL) return NULL;
  char* content = malloc(1 << 20);
  *size = fread(content, 1, 1 << 20, file);
  fclose(file);
  return content;
}

/* Options, the log, a runtime cache, an engine from memory. */
static int options(const char* folder, const char* cache) {
  spach_error error;
  spach_engine* engine = NULL;
  spach_context* context = NULL;
  spach_options chosen = SPACH_OPTIONS_DEFAULT;
  int messages = 0, passed = 0;
  if (spach_set_log(count_messages, &messages, 99, &error) == 0) return 40;
  if (spach_set_log(count_messages, &messages, SPACH_INFO, &error) != 0) return fail("log", &error);
  chosen.size = 1;
  if (spach_engine_load_with(folder, &chosen, &engine, &error) == 0 || engine != NULL) return 41;
  chosen.size = sizeof chosen;
  chosen.specialization = 7;
  if (spach_engine_load_with(folder, &chosen, &engine, &error) == 0) return 42;
  chosen.specialization = SPACH_EAGER;
  chosen.cuda_graphs = 1;
  chosen.runtime_cache_file = cache;
  chosen.threads = 2;
  if (spach_engine_load_with(folder, &chosen, &engine, &error) != 0) return fail("load", &error);
  if (spach_context_create(engine, &context, &error) != 0) return fail("context", &error);
  if (spach_context_warm_up(context, NULL, 0, &error) != 0) return fail("warm up", &error);
  if (spach_engine_save_runtime_cache(engine, &error) != 0) return fail("save", &error);
  spach_context_free(context);
  spach_engine_free(engine);
  if (messages == 0) return 43;

  size_t text_size = 0, plan_size = 0, golden_size = 0;
  char* text = content_of(folder, "model.txt", &text_size);
  char* plan = content_of(folder, "engine.plan", &plan_size);
  char* golden = content_of(folder, "golden.bin", &golden_size);
  chosen.runtime_cache = 0;
  if (spach_engine_load_memory(text, text_size, plan, plan_size - 1, NULL, 0, NULL, &engine,
                               &error) == 0)
    return 44;
  if (spach_engine_load_memory(text, text_size, plan, plan_size, NULL, 0, &chosen, &engine,
                               &error) != 0)
    return fail("memory", &error);
  free(text);
  free(plan);
  if (spach_engine_self_test(engine, &passed, &error) == 0 || passed != 0) return 45;
  if (spach_engine_self_test_golden(engine, golden, golden_size - 1, &passed, &error) == 0)
    return 46;
  if (spach_engine_self_test_golden(engine, golden, golden_size, &passed, &error) != 0)
    return fail("golden", &error);
  if (passed != 1 || spach_engine_save_runtime_cache(engine, &error) == 0) return 47;
  free(golden);
  spach_engine_free(engine);
  return spach_set_log(NULL, NULL, 0, &error);
}

int main(int argc, char** argv) {
  spach_error error;
  spach_engine* engine = NULL;
  spach_context* context = NULL;
  if (argc != 3) return 2;

  if (spach_engine_load(NULL, 0, &engine, &error) == 0 || engine != NULL) return 10;
  if (spach_engine_load("no such folder", 0, &engine, NULL) == 0) return 11;
  if (spach_context_create(NULL, &context, &error) == 0 || error.code != 1) return 12;
  spach_engine_free(NULL);
  spach_context_free(NULL);

  if (spach_engine_load(argv[1], 0, &engine, &error) != 0) return fail("load", &error);
  spach_model model;
  if (spach_engine_model(engine, &model, &error) != 0) return fail("model", &error);
  int passed = 0;
  if (spach_engine_self_test(engine, &passed, &error) != 0) return fail("self-test", &error);
  if (spach_context_create(engine, &context, &error) != 0) return fail("context", &error);

  const size_t classes = (size_t)model.classes;
  unsigned char* input = calloc(2, model.input_bytes);
  float* logits = malloc(2 * classes * sizeof(float));
  if (spach_context_logits(context, input, 2, logits, 2 * classes - 1, &error) == 0) return 13;
  if (spach_context_logits(context, input, (size_t)-1, logits, 2 * classes, &error) == 0) return 14;
  if (spach_context_logits(context, input, 2, logits, 2 * classes, &error) != 0)
    return fail("logits", &error);
  if (memcmp(logits, logits + classes, classes * sizeof(float)) != 0) return 15;

  /* Tensors by name, batches, outputs in their own types. */
  int min = 0, opt = 0, max = 0;
  spach_tensor tensor, scores;
  if (spach_engine_batches(engine, &min, &opt, &max, &error) != 0) return fail("batches", &error);
  if (min != model.batch_min || max != model.batch_max || opt < min || opt > max) return 20;
  if (spach_engine_input(engine, &tensor, &error) != 0) return fail("input", &error);
  if (strcmp(tensor.name, "input") != 0 || tensor.dtype != SPACH_FLOAT32 || tensor.rank != 3 ||
      tensor.shape[0] != model.channels || tensor.bytes != model.input_bytes)
    return 21;
  if (spach_engine_output_named(engine, "logits", &scores, &error) != 0)
    return fail("output", &error);
  if (scores.role != SPACH_LOGITS || scores.items != classes || scores.bytes != 4 * classes)
    return 22;
  if (spach_engine_output_named(engine, "no such", &tensor, &error) == 0) return 23;
  if (spach_engine_output(engine, model.output_count, &tensor, &error) == 0) return 24;
  if (spach_engine_output(engine, model.output_count - 1, &tensor, &error) != 0) return 25;
  if (strcmp(tensor.name, "top_indices") != 0 || tensor.dtype != SPACH_INT64) return 26;
  float* again = malloc(COUNT * scores.bytes);
  int64_t* indices = malloc(COUNT * tensor.bytes);
  spach_buffer buffers[2] = {{tensor.name, indices, COUNT * tensor.bytes},
                             {"logits", again, COUNT * scores.bytes}};
  if (spach_context_run(context, input, COUNT * model.input_bytes, COUNT, buffers, 2, &error) != 0)
    return fail("run", &error);
  if (memcmp(again, logits, COUNT * scores.bytes) != 0 || indices[0] != indices[tensor.items])
    return 27;
  buffers[1].bytes -= 1;
  if (spach_context_run(context, input, COUNT * model.input_bytes, COUNT, buffers, 2, &error) == 0)
    return 28;
  buffers[1].name = "no such";
  if (spach_context_run(context, input, COUNT * model.input_bytes, COUNT, buffers, 2, &error) == 0)
    return 29;

  /* In flight. */
  void* slot = NULL;
  const void* answer = NULL;
  size_t bytes = 0;
  if (spach_context_input(context, 1, &slot, &bytes, &error) != 0) return fail("slot", &error);
  if (bytes != (size_t)max * model.input_bytes) return 30;
  memcpy(slot, input, COUNT * model.input_bytes);
  if (spach_context_waited(context, 1, "logits", &answer, &bytes, &error) == 0) return 31;
  if (spach_context_submit(context, 1, COUNT, &error) != 0) return fail("submit", &error);
  if (spach_context_submit(context, 1, COUNT, &error) == 0) return 32;
  if (spach_context_wait(context, 1, &error) != 0) return fail("wait", &error);
  if (spach_context_waited(context, 1, "no such", &answer, &bytes, &error) == 0) return 33;
  if (spach_context_waited(context, 1, "logits", &answer, &bytes, &error) != 0)
    return fail("waited", &error);
  if (bytes != COUNT * scores.bytes || memcmp(answer, logits, bytes) != 0) return 34;

  unsigned char rgb[6 * 5 * 3];
  memset(rgb, 200, sizeof rgb);
  spach_prediction best[3];
  size_t found = 0;
  if (spach_context_classify_rgb8(context, rgb, 6, 5, 1, 3, best, &found, &error) == 0) return 16;
  if (spach_context_classify_rgb8(context, rgb, 6, 5, 0, 3, best, &found, &error) != 0)
    return fail("classify", &error);
  if (found != 3 || best[0].logit < best[1].logit) return 17;
  spach_image pictures[COUNT] = {{rgb, 6, 5, 0, 3}, {rgb, 3, 5, 0, 3}};
  spach_prediction all[COUNT * 3];
  size_t each[COUNT] = {0};
  if (spach_context_classify(context, pictures, COUNT, 3, all, each, &error) != 0)
    return fail("classify pictures", &error);
  if (each[1] != 3 || all[0].index != best[0].index || all[0].logit != best[0].logit) return 35;
  if (spach_context_preprocess(context, pictures, COUNT, input, &error) != 0)
    return fail("preprocess", &error);
  if (spach_context_logits(context, input, COUNT, again, COUNT * classes, &error) != 0 ||
      again[best[0].index] != best[0].logit)
    return 36;
  if (spach_context_enqueue(context, NULL, 1, NULL, 0, NULL, &error) == 0) return 18;
  const char* label = spach_engine_label(engine, best[0].index);
  const int sizes[1] = {1};
  if (spach_context_warm_up(context, NULL, 0, &error) != 0) return fail("warm up", &error);
  if (spach_context_warm_up(context, sizes, 1, &error) != 0) return fail("warm up", &error);
  spach_engine_free(engine); /* the context keeps what it needs */
  engine = NULL;
  if (spach_context_classify_rgb8(context, rgb, 6, 5, 0, 3, best, NULL, &error) != 0) return 19;
  (void)label;
  spach_context_free(context);
  free(input);
  free(logits);
  free(again);
  free(indices);
  const int failed = options(argv[1], argv[2]);
  if (failed != 0) return failed;
  printf("classes %d, batch %d to %d, passed %d\n", model.classes, model.batch_min, model.batch_max,
         passed);
  return 0;
}
