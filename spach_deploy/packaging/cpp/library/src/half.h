// IEEE 754 binary16 in software: conversions that need no GPU and no compiler extension.
#pragma once

#include <cstdint>
#include <cstring>

namespace spach {

// Round to nearest, ties to even, as NumPy and GPUs do.
inline std::uint16_t half_from_float(float value) noexcept {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
  if (bits >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65536 and above
  std::uint32_t mantissa = bits & 0x7fffffu;
  int exponent = static_cast<int>(bits >> 23) - 112;  // biased for half
  int drop = 13;
  if (exponent <= 0) {  // subnormal in half
    if (exponent < -10) return sign;
    mantissa |= 0x800000u;
    drop += 1 - exponent;
    exponent = 0;
  }
  std::uint32_t result = (static_cast<std::uint32_t>(exponent) << 10) | (mantissa >> drop);
  const std::uint32_t rest = mantissa & ((1u << drop) - 1), tie = 1u << (drop - 1);
  if (rest > tie || (rest == tie && (result & 1u) != 0)) ++result;  // may carry into the exponent
  return static_cast<std::uint16_t>(sign | result);
}

inline float float_from_half(std::uint16_t half) noexcept {
  const std::uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u;
  std::uint32_t mantissa = half & 0x3ffu, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace spach
