// What TensorRT and this library say while they work.
#pragma once

#include <functional>
#include <string_view>

#include "spach/result.h"

namespace spach {

enum class Severity : int { internal_error, error, warning, info, verbose };

// In words, such as "warning".
const char* name_of(Severity severity) noexcept;

// A message without an end of line. Called from several threads at once, also TensorRT's own; must
// not call this library. What it throws is lost.
using LogCallback = std::function<void(Severity, std::string_view)>;

// Passes messages on to `callback`, those up to `most` (`warning`: errors and warnings); an empty
// one ends that. It is the whole process's, because TensorRT keeps the first logger it was given. A
// message that is on its way may still reach the callback before.
Status set_log(LogCallback callback, Severity most = Severity::warning) noexcept;

}  // namespace spach
