// A block's table of sixteen weights in AVX-512 registers. Included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "number.h"

namespace lofi {

static inline __m512 products(const float* map, float scale) { return _mm512_mul_ps(_mm512_loadu_ps(map), _mm512_set1_ps(scale)); }

// Round to nearest even to bf16, in integers: the bf16 instruction takes denormals for zero.
static inline __m256i to_bfloat16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}

static inline __m256i rounded(__m512 values, BFloat16) { return to_bfloat16(values); }
static inline __m256i rounded(__m512 values, Float16) { return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline __m512 widened(__m256i values, BFloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }
static inline __m512 widened(__m256i values, Float16) { return _mm512_cvtph_ps(values); }

// The table as float32 of values that T can hold.
template <class T>
static inline __m512 table_of(const float* map, float scale, T type) {
  return widened(rounded(products(map, scale), type), type);
}
static inline __m512 table_of(const float* map, float scale, float) { return products(map, scale); }

}  // namespace lofi
