/* The library for C, and for every language that can call C. The same rules as in engine.h hold: an
 * engine may be used by several threads at once, a context by one at a time. Functions that can
 * fail return 0, or the number of an error (spach::ErrorCode) and fill `error`, which may be null.
 * Text is UTF-8, paths too, on Windows as elsewhere.
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

/* spach::DType, spach::Role, spach::Specialization and spach::Severity. */
enum { SPACH_FLOAT32, SPACH_FLOAT16, SPACH_UINT8, SPACH_INT64 };
enum {
  SPACH_OTHER,
  SPACH_LOGITS,
  SPACH_EMBEDDING,
  SPACH_FEATURES,
  SPACH_PROBABILITIES,
  SPACH_TOP_VALUES,
  SPACH_TOP_INDICES
};
enum { SPACH_LAZY, SPACH_EAGER, SPACH_NONE };
enum { SPACH_INTERNAL_ERROR, SPACH_ERROR, SPACH_WARNING, SPACH_INFO, SPACH_VERBOSE };

/* An input or output. `name` is valid as long as the engine. */
typedef struct spach_tensor {
  const char* name;
  int dtype;        /* SPACH_FLOAT32, ... */
  int role;         /* SPACH_LOGITS, ...; of outputs */
  int rank;         /* without the batch, at most 4 */
  int64_t shape[4]; /* of one image */
  size_t items;     /* of one image */
  size_t bytes;     /* of one image */
} spach_tensor;

/* spach::EngineOptions. Begin with SPACH_OPTIONS_DEFAULT. */
typedef struct spach_options {
  size_t size; /* sizeof(spach_options) */
  int device;
  int runtime_cache;              /* 0: none */
  const char* runtime_cache_file; /* null: in the user's cache folder */
  int cuda_graphs;
  int specialization; /* SPACH_LAZY, ... */
  int threads;        /* that preprocess the pictures of a batch */
} spach_options;
#define SPACH_OPTIONS_DEFAULT {sizeof(spach_options), 0, 1, NULL, 0, SPACH_LAZY, 1}

/* A picture as in spach::Image. */
typedef struct spach_image {
  const uint8_t* pixels;
  int width;
  int height;
  size_t stride; /* bytes from row to row; 0: they lie one after another */
  int channels;  /* bytes of a pixel; 3: RGB */
} spach_image;

/* Where an output of a batch is to be copied to, in its own dtype. */
typedef struct spach_buffer {
  const char* name; /* the output's */
  void* data;
  size_t bytes; /* batch * spach_tensor.bytes */
} spach_buffer;

/* Passes messages up to severity `most` on to `callback`, from several threads at once; null ends
 * that. For the whole process, as spach::set_log. */
typedef void (*spach_log)(void* user, int severity, const char* message);
int spach_set_log(spach_log callback, void* user, int most, spach_error* error);

/* Loads a model folder for a CUDA device. `*engine` is null after an error. */
int spach_engine_load(const char* folder, int device, spach_engine** engine, spach_error* error);
int spach_engine_load_with(const char* folder, const spach_options* options, spach_engine** engine,
                           spach_error* error);
/* The content of model.txt, engine.plan and labels.txt (null: none); only read during the call.
 * `options` may be null. */
int spach_engine_load_memory(const char* text, size_t text_size, const void* plan, size_t plan_size,
                             const char* labels, size_t labels_size, const spach_options* options,
                             spach_engine** engine, spach_error* error);
void spach_engine_free(spach_engine* engine); /* contexts may outlive it; null is fine */
int spach_engine_model(const spach_engine* engine, spach_model* model, spach_error* error);
/* Smallest, usual and largest batch of the plan's profile; each may be null. */
int spach_engine_batches(const spach_engine* engine, int* min, int* opt, int* max,
                         spach_error* error);
int spach_engine_input(const spach_engine* engine, spach_tensor* tensor, spach_error* error);
/* By position, below spach_model.output_count, or by name. */
int spach_engine_output(const spach_engine* engine, size_t index, spach_tensor* tensor,
                        spach_error* error);
int spach_engine_output_named(const spach_engine* engine, const char* name, spach_tensor* tensor,
                              spach_error* error);
/* Writes the runtime cache now. It is written anyway when the engine and its contexts are gone. */
int spach_engine_save_runtime_cache(const spach_engine* engine, spach_error* error);
/* A class's label, valid as long as the engine; "" for one that has none. */
const char* spach_engine_label(const spach_engine* engine, int index);
/* 1 in `*passed` where the golden pack agrees. */
int spach_engine_self_test(const spach_engine* engine, int* passed, spach_error* error);

/* The same with the content of golden.bin, as for an engine that was loaded from memory. */
int spach_engine_self_test_golden(const spach_engine* engine, const void* golden, size_t size,
                                  int* passed, spach_error* error);

int spach_context_create(const spach_engine* engine, spach_context** context, spach_error* error);
void spach_context_free(spach_context* context);

/* The `k` best classes of one picture into `predictions`, which has room for `k`. `stride` 0: rows
 * lie one after another. `*found` (may be null) is how many there are, at most the classes. */
int spach_context_classify_rgb8(spach_context* context, const uint8_t* rgb, int width, int height,
                                size_t stride, size_t k, spach_prediction* predictions,
                                size_t* found, spach_error* error);
/* The `k` best classes of each of `count` pictures: `predictions` has room for count * k, a
 * picture's begin at its number times k; `found` (may be null) is how many each has. */
int spach_context_classify(spach_context* context, const spach_image* images, size_t count,
                           size_t k, spach_prediction* predictions, size_t* found,
                           spach_error* error);
/* One batch of preprocessed inputs; copies the outputs that are named. */
int spach_context_run(spach_context* context, const void* input, size_t input_bytes, int batch,
                      const spach_buffer* outputs, size_t output_count, spach_error* error);
/* Preprocesses pictures to `destination`, which has room for count * spach_model.input_bytes. */
int spach_context_preprocess(spach_context* context, const spach_image* images, size_t count,
                             void* destination, spach_error* error);
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

/* Batches in flight without a copy in host memory, as spach::Context::submit: write a batch to the
 * `*input` of a slot, below 16, submit it, wait for it, read its outputs where they lie. */
int spach_context_input(spach_context* context, size_t slot, void** input, size_t* bytes,
                        spach_error* error);
int spach_context_submit(spach_context* context, size_t slot, int batch, spach_error* error);
int spach_context_wait(spach_context* context, size_t slot, spach_error* error);
/* An output of the batch that was waited for, valid until the slot is submitted again. */
int spach_context_waited(spach_context* context, size_t slot, const char* name, const void** data,
                         size_t* bytes, spach_error* error);
/* Runs `count` batch sizes, or the profile's three where `batches` is null, as
 * spach::Context::warm_up. */
int spach_context_warm_up(spach_context* context, const int* batches, size_t count,
                          spach_error* error);

#ifdef __cplusplus
}
#endif

#endif
