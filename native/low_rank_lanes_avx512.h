// Sixteen floats in an AVX-512 register. Included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "low_rank_rows.h"
#include "nf4_table_avx512.h"

namespace lofi {
namespace {

struct Avx512Lanes {
  using V = __m512;
  static constexpr int kWidth = 16, kTile = 16;
  static V all(float value) { return _mm512_set1_ps(value); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V sum) { return _mm512_fmadd_ps(a, b, sum); }
  static float sum(V v) { return _mm512_reduce_add_ps(v); }

  static __m256i bits(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
  static V load(const float* at) { return _mm512_loadu_ps(at); }
  static V load(const BFloat16* at) { return widened(bits(at), BFloat16{}); }
  static V load(const Float16* at) { return widened(bits(at), Float16{}); }

  static void store(V v, float* at) { _mm512_storeu_ps(at, v); }
  template <class T>
  static void store(V v, T* at) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), rounded(v, T{}));
  }
};

}  // namespace
}  // namespace lofi
