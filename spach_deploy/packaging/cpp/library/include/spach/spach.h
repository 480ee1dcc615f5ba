// Everything: `spach::Engine::load("model")` is where to begin.
#pragma once

#include "spach/engine.h"
#include "spach/facts.h"
#include "spach/golden.h"
#include "spach/log.h"
#include "spach/options.h"
#include "spach/preprocess.h"
#include "spach/ranking.h"
#include "spach/result.h"
