// Float types as bits, one element at a time, written so that compilers turn loops over them into vector code.
#pragma once

#include <cstdint>
#include <cstring>

namespace lofi {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Each type: its storage, the bits of its magnitude and of infinity, both directions of conversion (to nearest even).
struct Float32 {
  using Bits = uint32_t;
  static constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
  static float widen(Bits b) { return as_float(b); }
  static Bits narrow(float v) { return as_bits(v); }
};

struct Bfloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t kMagnitude = 0x7fffu, kInfinity = 0x7f80u;
  static float widen(Bits b) { return as_float(static_cast<uint32_t>(b) << 16); }
  static Bits narrow(float v) {
    const uint32_t b = as_bits(v);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const bool nan = (b & 0x7fffffffu) > 0x7f800000u;
    return static_cast<Bits>(nan ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t kMagnitude = 0x7fffu, kInfinity = 0x7c00u;

  // Shifting the exponent by 112 leaves infinities short by another 112, and subnormals right after a subtraction.
  static float widen(Bits b) {
    const uint32_t magnitude = static_cast<uint32_t>(b & 0x7fffu) << 13, sign = static_cast<uint32_t>(b & 0x8000u) << 16;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = magnitude + (224u << 23);
    const uint32_t subnormal = as_bits(as_float(magnitude + (113u << 23)) - as_float(113u << 23));
    const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
    return as_float(sign | (magnitude >= (31u << 23) ? special : finite));
  }

  // Adding half of the last place that stays makes the addition unit do the rounding of subnormals.
  static Bits narrow(float v) {
    const uint32_t b = as_bits(v), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + as_float(126u << 23)) - (126u << 23);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return static_cast<Bits>(sign | (magnitude >= (143u << 23) ? large : finite));
  }
};

}  // namespace
}  // namespace lofi
