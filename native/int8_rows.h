// Row-wise codes of activations and weights, and back, once for every path (see int8.h).
// Magnitudes are compared as integers: the order is the same, NaN comes out as the largest, and compilers make vectors.
#pragma once

#include "int8.h"
#include "int8_types.h"

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

constexpr int64_t kRun = 64;  // outliers are few: runs of so many elements without one are passed over at once

template <class Float>
bool is_apart(typename Float::Bits x, uint32_t threshold) {
  const uint32_t magnitude = x & Float::kMagnitude;
  return magnitude >= threshold && magnitude <= Float::kInfinity;  // NaN is no outlier: it must show
}

// The largest magnitude below the threshold, marking the columns of the others.
template <class Float>
uint32_t largest_below(const typename Float::Bits* x, int64_t n, uint32_t threshold, uint8_t* found) {
  uint32_t most = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t end = start + kRun < n ? start + kRun : n;
    uint32_t here = largest<Float>(x + start, end - start);
    if (here >= threshold) {
      here = 0;
      for (int64_t i = start; i < end; ++i) {
        const uint32_t magnitude = x[i] & Float::kMagnitude;
        if (is_apart<Float>(x[i], threshold)) found[i] = 1;
        else here = magnitude > here ? magnitude : here;
      }
    }
    most = here > most ? here : most;
  }
  return most;
}

// round(x * factor), half to even: adding 1.5 * 2^23 leaves the integer in the low bits.
inline int8_t code(float value) {
  value = value > 127.0f ? 127.0f : value;
  value = value < -127.0f ? -127.0f : value;
  value = value == value ? value : 0.0f;
  return static_cast<int8_t>(bits_of(value + 12582912.0f));
}

template <class Float>
void encode(const typename Float::Bits* x, int64_t n, float factor, int8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = code(Float::widen(x[i]) * factor);
}

// The codes of outliers are 0.
template <class Float>
void erase_apart(const typename Float::Bits* x, int64_t n, uint32_t threshold, int8_t* codes) {
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t end = start + kRun < n ? start + kRun : n;
    if (largest<Float>(x + start, end - start) < threshold) continue;
    for (int64_t i = start; i < end; ++i)
      if (is_apart<Float>(x[i], threshold)) codes[i] = 0;
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
    encode<Float>(x, p.i, factor, p.codes + r * p.i);
    if (apart) erase_apart<Float>(x, p.i, threshold, p.codes + r * p.i);
  }
}

inline void rows(const Int8Rows& p, int64_t first, int64_t last) {
  if (p.dtype == kFloat32) rows_of<AsFloat32>(p, first, last);
  else if (p.dtype == kBFloat16) rows_of<AsBFloat16>(p, first, last);
  else rows_of<AsFloat16>(p, first, last);
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
  if (p.dtype == kFloat32) dense_of<AsFloat32>(p, first, last);
  else if (p.dtype == kBFloat16) dense_of<AsBFloat16>(p, first, last);
  else dense_of<AsFloat16>(p, first, last);
}

}  // namespace
}  // namespace lofi
