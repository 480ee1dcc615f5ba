#include "spach/result.h"

namespace spach {

const char* name_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::bad_argument: return "bad argument";
    case ErrorCode::bad_file: return "bad file";
    case ErrorCode::not_a_plan: return "not a plan";
    case ErrorCode::truncated: return "truncated";
    case ErrorCode::changed: return "changed file";
    case ErrorCode::other_flavour: return "other TensorRT flavour";
    case ErrorCode::other_version: return "other TensorRT version";
    case ErrorCode::no_gpu: return "no GPU";
    case ErrorCode::wrong_gpu: return "wrong GPU";
    case ErrorCode::out_of_memory: return "out of memory";
    case ErrorCode::cuda: return "CUDA error";
    case ErrorCode::engine: return "TensorRT error";
    case ErrorCode::busy: return "context in use";
  }
  return "unknown error";
}

}  // namespace spach
