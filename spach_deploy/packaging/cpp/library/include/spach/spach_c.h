/* The library for C, and for every language that can call C. The same rules as in engine.h hold: an
 * engine may be used by several threads at once, a context by one at a time. Functions that can
 * fail return 0, or the number of an error (spach::ErrorCode) and fill `error`, which may be null.
 */
#ifndef SPACH_SPACH_C_H
#define SPACH_SPACH_C_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct spach_engine spach_engine;
typedef struct spach_context spach_context;

typedef struct spach_error {
  int code;          /* 0: none */
  char message[512]; /* "wrong GPU. The plan is for ...", cut to fit, always terminated */
} spach_error;

typedef struct spach_prediction {
  int index;
  float logit;
  float probability;
} spach_prediction;

typedef struct spach_model {
  int image_height;
  int image_width;
  int channels;
  int classes;
  int batch_min;
  int batch_max;
  size_t input_bytes;  /* of one image */
  size_t output_count; /* what spach_context_enqueue takes */
} spach_model;

/* Loads a model folder for a CUDA device. `*engine` is null after an error. */
int spach_engine_load(const char* folder, int device, spach_engine** engine, spach_error* error);
void spach_engine_free(spach_engine* engine); /* contexts may outlive it; null is fine */
int spach_engine_model(const spach_engine* engine, spach_model* model, spach_error* error);
/* A class's label, valid as long as the engine; "" for one that has none. */
const char* spach_engine_label(const spach_engine* engine, int index);
/* 1 in `*passed` where the golden pack agrees. */
int spach_engine_self_test(const spach_engine* engine, int* passed, spach_error* error);

int spach_context_create(const spach_engine* engine, spach_context** context, spach_error* error);
void spach_context_free(spach_context* context);

/* The `k` best classes of one picture into `predictions`, which has room for `k`. `stride` 0: rows
 * lie one after another. `*found` (may be null) is how many there are, at most the classes. */
int spach_context_classify_rgb8(spach_context* context, const uint8_t* rgb, int width, int height,
                                size_t stride, size_t k, spach_prediction* predictions,
                                size_t* found, spach_error* error);
/* Logits (count, classes) of `count` inputs in host memory; `logits_size` counts floats. */
int spach_context_logits(spach_context* context, const void* input, size_t count, float* logits,
                         size_t logits_size, spach_error* error);
/* One output (count, items), such as an embedding, by its name, as `spach_context_logits` does. */
int spach_context_output(spach_context* context, const char* name, const void* input, size_t count,
                         float* values, size_t values_size, spach_error* error);
/* One batch from and to device memory on a cudaStream_t, without waiting. */
int spach_context_enqueue(spach_context* context, const void* device_input, int batch,
                          void* const* device_outputs, size_t output_count, void* stream,
                          spach_error* error);

#ifdef __cplusplus
}
#endif

#endif
