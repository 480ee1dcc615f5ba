#pragma once

#include <cstddef>
#include <string>

namespace spach {

// SHA-256 (FIPS 180-4) in hexadecimal.
std::string sha256(const void* data, std::size_t size);

}  // namespace spach
