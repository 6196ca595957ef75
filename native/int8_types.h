// The element types of int8's tensors as bits: magnitudes that compare as integers, and number.h's conversions.
#pragma once

#include "number.h"

namespace lofi {
namespace {

struct AsFloat32 {
  using Bits = uint32_t;
  static constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
  static float widen(Bits bits) { return float_of(bits); }
  static Bits narrow(float value) { return bits_of(value); }
};

template <class Number, uint32_t Infinity>
struct As16 {
  using Bits = uint16_t;
  static constexpr uint32_t kMagnitude = 0x7fffu, kInfinity = Infinity;
  static float widen(Bits bits) { return to_float(Number{bits}); }
  static Bits narrow(float value) {
    Number rounded;
    round_to(value, rounded);
    return rounded.bits;
  }
};

using AsBFloat16 = As16<BFloat16, 0x7f80u>;
using AsFloat16 = As16<Float16, 0x7c00u>;

}  // namespace
}  // namespace lofi
