// Included first by every cpu/<op>_<isa>.cpp: standard headers, before the target pragma changes how code is compiled,
// so that inline library functions keep the plain instruction set.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/dispatch.h"
#include "types.h"
