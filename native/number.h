// float32 to and from the 16-bit types, in integers: round to nearest even, denormals kept, NaN stays NaN.
// Every function is `static`: files for other instruction sets have their own copies (see cpu.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace lofi {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

static inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);  // inf, NaN
  // shift exponent and mantissa into place, then scale by 2^(127 - 15): exact, denormals included
  const float scaled = float_of(rest << 13) * float_of(0x77800000u);
  return float_of(sign | bits_of(scaled));
}

static inline void round_to(float value, float& out) { out = value; }

static inline void round_to(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = 0x7fc0;
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

static inline void round_to(float value, Float16& out) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) {
    out.bits = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // half way past the largest, 65504, or more
    out.bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: denormal; adding 1/2 rounds at the right place, 2^-24
    out.bits = static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    out.bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
}

// Calls body(T{}) with the C++ type of a dtype of abi.h.
template <class Body>
static inline void with_type(int dtype, const Body& body) {
  if (dtype == kFloat32) {
    body(float{});
  } else if (dtype == kBFloat16) {
    body(BFloat16{});
  } else {
    body(Float16{});
  }
}

}  // namespace lofi
