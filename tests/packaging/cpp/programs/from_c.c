/* The C API from C: load, self-test, logits, classes, and errors. Prints what it found. */
#include <spach/spach_c.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char* what, const spach_error* error) {
  printf("%s: %d %s\n", what, error->code, error->message);
  return 1;
}

int main(int argc, char** argv) {
  spach_error error;
  spach_engine* engine = NULL;
  spach_context* context = NULL;
  if (argc != 2) return 2;

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

  unsigned char rgb[6 * 5 * 3];
  memset(rgb, 200, sizeof rgb);
  spach_prediction best[3];
  size_t found = 0;
  if (spach_context_classify_rgb8(context, rgb, 6, 5, 1, 3, best, &found, &error) == 0) return 16;
  if (spach_context_classify_rgb8(context, rgb, 6, 5, 0, 3, best, &found, &error) != 0)
    return fail("classify", &error);
  if (found != 3 || best[0].logit < best[1].logit) return 17;
  if (spach_context_enqueue(context, NULL, 1, NULL, 0, NULL, &error) == 0) return 18;
  const char* label = spach_engine_label(engine, best[0].index);
  spach_engine_free(engine); /* the context keeps what it needs */
  engine = NULL;
  if (spach_context_classify_rgb8(context, rgb, 6, 5, 0, 3, best, NULL, &error) != 0) return 19;
  (void)label;
  spach_context_free(context);
  free(input);
  free(logits);
  printf("classes %d, batch %d to %d, passed %d\n", model.classes, model.batch_min, model.batch_max,
         passed);
  return 0;
}
