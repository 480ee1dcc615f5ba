#pragma once

#include <cstddef>
#include <string>

#include "spach/facts.h"
#include "spach/result.h"

namespace spach {

// The TensorRT that would load a plan.
struct Library {
  std::string flavour;  // "tensorrt" or "tensorrt-rtx"
  int version[3] = {0, 0, 0};
};

// Whether the plan may be shown to TensorRT: its beginning, size, hash, flavour and version. The
// order is that of usefulness: what the file is, whether it is whole, whether it is the exported
// one, whether this program can load it.
Status check_plan(const std::byte* plan, std::size_t size, const ModelFacts& facts,
                  const Library& library);

std::string dotted(const int (&version)[3]);

}  // namespace spach
