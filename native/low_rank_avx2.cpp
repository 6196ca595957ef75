// Low-rank products for CPUs with AVX2, FMA and F16C.
#include <immintrin.h>

#include "low_rank_rows.h"

namespace lofi {
namespace {

struct Avx2Lanes {
  using V = __m256;
  static constexpr int kWidth = 8, kTile = 8;
  static V all(float value) { return _mm256_set1_ps(value); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V sum) { return _mm256_fmadd_ps(a, b, sum); }

  static float sum(V v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  static __m128i bits(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
  static V load(const float* at) { return _mm256_loadu_ps(at); }
  static V load(const Float16* at) { return _mm256_cvtph_ps(bits(at)); }
  static V load(const BFloat16* at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits(at)), 16));
  }

  static void store(V v, float* at) { _mm256_storeu_ps(at, v); }
  static void store(V v, Float16* at) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(V v, BFloat16* at) {
    float values[kWidth];
    _mm256_storeu_ps(values, v);
    for (int i = 0; i < kWidth; ++i) round_to(values[i], at[i]);
  }
};

}  // namespace

const LowRankPath kLowRankAvx2 = {rows<Avx2Lanes>};

}  // namespace lofi
