// Row-wise codes of activations and weights, and back, once for every path (see int8.h).
// Magnitudes are compared as integers: the order is the same, NaN comes out as the largest, and compilers make vectors.
#pragma once

#include "int8.h"
#include "int8_convert.h"

namespace lofi {
namespace {

template <class Float>
uint32_t largest(const typename Float::Bits* x, int64_t n) {
  using Bits = typename Float::Bits;
  Bits most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits magnitude = x[i] & Float::kMagnitude;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

// The largest magnitude below the threshold, marking the columns of the others. NaN is no outlier: it must show.
template <class Float>
uint32_t largest_below(const typename Float::Bits* x, int64_t n, uint32_t threshold, uint8_t* found) {
  using Bits = typename Float::Bits;
  Bits most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits magnitude = x[i] & Float::kMagnitude;
    const bool apart = magnitude >= threshold && magnitude <= Float::kInfinity;
    const Bits kept = apart ? Bits{0} : magnitude;
    most = kept > most ? kept : most;
    found[i] |= apart;
  }
  return most;
}

// round(x * factor), half to even: adding 1.5 * 2^23 leaves the integer in the low bits.
inline int8_t code(float value) {
  value = value > 127.0f ? 127.0f : value;
  value = value < -127.0f ? -127.0f : value;
  value = value == value ? value : 0.0f;
  return static_cast<int8_t>(as_bits(value + 12582912.0f));
}

template <class Float>
void encode(const typename Float::Bits* x, int64_t n, float factor, int8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = code(Float::widen(x[i]) * factor);
}

template <class Float>
void encode_below(const typename Float::Bits* x, int64_t n, float factor, uint32_t threshold, int8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = x[i] & Float::kMagnitude;
    const int8_t c = code(Float::widen(x[i]) * factor);
    codes[i] = magnitude >= threshold && magnitude <= Float::kInfinity ? int8_t{0} : c;
  }
}

template <class Float>
void rows_of(const Int8Rows& p, int64_t first, int64_t last) {
  using Bits = typename Float::Bits;
  const uint32_t threshold = Float::narrow(p.threshold);
  for (int64_t r = first; r < last; ++r) {
    const Bits* x = static_cast<const Bits*>(p.x) + r * p.stride;
    uint32_t most = largest<Float>(x, p.i);
    const bool apart = p.found && most >= threshold;
    if (apart) most = largest_below<Float>(x, p.i, threshold, p.found);
    const float scale = Float::widen(static_cast<Bits>(most));
    const float factor = scale > 0.0f ? 1.0f / scale * 127.0f : 0.0f;  // as torch divides a number by a tensor
    p.scale[r] = scale;
    if (apart) encode_below<Float>(x, p.i, factor, threshold, p.codes + r * p.i);
    else encode<Float>(x, p.i, factor, p.codes + r * p.i);
  }
}

inline void rows(const Int8Rows& p, int64_t first, int64_t last) {
  if (p.dtype == kFloat32) rows_of<Float32>(p, first, last);
  else if (p.dtype == kBFloat16) rows_of<Bfloat16>(p, first, last);
  else rows_of<Float16>(p, first, last);
}

template <class Float>
void dense_of(const Int8Dense& p, int64_t first, int64_t last) {
  using Bits = typename Float::Bits;
  for (int64_t r = first; r < last; ++r) {
    const float scale = p.scale[r] * (1.0f / 127.0f);
    const int8_t* codes = p.codes + r * p.i;
    Bits* out = static_cast<Bits*>(p.out) + r * p.i;
    for (int64_t i = 0; i < p.i; ++i) out[i] = Float::narrow(static_cast<float>(codes[i]) * scale);
  }
}

inline void dense(const Int8Dense& p, int64_t first, int64_t last) {
  if (p.dtype == kFloat32) dense_of<Float32>(p, first, last);
  else if (p.dtype == kBFloat16) dense_of<Bfloat16>(p, first, last);
  else dense_of<Float16>(p, first, last);
}

}  // namespace
}  // namespace lofi
