// 4-bit kernels in AVX2 (with fma and f16c).
//
// Look-up: a block's sixteen products, rounded once, as two registers of eight floats chosen by the code's fourth bit, or
// as planes of sixteen low and sixteen high bytes that a byte shuffle looks up.
#include <immintrin.h>

#include "nf4_portable.h"

namespace lofi {
namespace {

__m256 products(const float* map, float scale) { return _mm256_mul_ps(_mm256_loadu_ps(map), _mm256_set1_ps(scale)); }

__m128i packed(__m256i words) { return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)); }

__m128i rounded(__m256 values, BFloat16) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return packed(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan));
}
__m128i rounded(__m256 values, Float16) { return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }

__m256 widened(__m128i values, BFloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16)); }
__m256 widened(__m128i values, Float16) { return _mm256_cvtph_ps(values); }

struct Floats {  // the table as float32, of values that T can hold
  __m256 low, high;

  template <class T>
  Floats(const float* map, float scale, T type)
      : low(widened(rounded(products(map, scale), type), type)), high(widened(rounded(products(map + 8, scale), type), type)) {}
  Floats(const float* map, float scale, float) : low(products(map, scale)), high(products(map + 8, scale)) {}

  __m256 at(__m256i places) const {  // reads the low four bits of each
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, places), _mm256_permutevar8x32_ps(high, places), upper);
  }
};

// 8 weights from 4 bytes, in order: the even ones are high nibbles.
__m256i eight_places(const uint8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, 4);
  const __m256i b = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return _mm256_or_si256(_mm256_srli_epi64(b, 4), _mm256_slli_epi64(b, 32));
}

struct Avx2 {
  template <class T>
  static void run(const uint8_t* codes, int64_t i, int64_t count, const float* map, float scale, T* out) {
    const __m128i low = rounded(products(map, scale), T{}), high = rounded(products(map + 8, scale), T{});
    alignas(16) T table[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(table), low);
    _mm_store_si128(reinterpret_cast<__m128i*>(table + 8), high);
    const __m128i byte = _mm_set1_epi16(0xff), nibble = _mm_set1_epi8(15);
    const __m128i lows = _mm_packus_epi16(_mm_and_si128(low, byte), _mm_and_si128(high, byte));
    const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(low, 8), _mm_srli_epi16(high, 8));
    codes += i / 2;
    if (i % 2 && count) {
      *out++ = table[*codes++ & 15];
      --count;
    }
    for (; count >= 32; count -= 32, codes += 16, out += 32) {
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      const __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), nibble), odd = _mm_and_si128(b, nibble);
      store_sixteen(_mm_unpacklo_epi8(even, odd), lows, highs, out);
      store_sixteen(_mm_unpackhi_epi8(even, odd), lows, highs, out + 16);
    }
    for (; count >= 2; count -= 2, ++codes, out += 2) {
      out[0] = table[*codes >> 4];
      out[1] = table[*codes & 15];
    }
    if (count) *out = table[*codes >> 4];
  }

  static void run(const uint8_t* codes, int64_t i, int64_t count, const float* map, float scale, float* out) {
    const Floats table(map, scale, 0.0f);
    codes += i / 2;
    if (i % 2 && count) {
      *out++ = map[*codes++ & 15] * scale;
      --count;
    }
    for (; count >= 8; count -= 8, codes += 4, out += 8) _mm256_storeu_ps(out, table.at(eight_places(codes)));
    for (; count >= 2; count -= 2, ++codes, out += 2) {
      out[0] = map[*codes >> 4] * scale;
      out[1] = map[*codes & 15] * scale;
    }
    if (count) *out = map[*codes >> 4] * scale;
  }

  template <class T>
  static void chunk(const uint8_t* codes, const float* map, float scale, T type, float* out) {
    const Floats table(map, scale, type);
    for (int64_t j = 0; j < kChunk; j += 8, codes += 4) _mm256_storeu_ps(out + j, table.at(eight_places(codes)));
  }

  static float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

 private:
  static void store_sixteen(__m128i places, __m128i lows, __m128i highs, void* out) {
    const __m128i low = _mm_shuffle_epi8(lows, places), high = _mm_shuffle_epi8(highs, places);
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128(static_cast<__m128i*>(out) + 1, _mm_unpackhi_epi8(low, high));
  }
};

using P = Portable<Avx2>;

}  // namespace

const Nf4Path kNf4Avx2 = {P::dequantize, P::quantize};
const Nf4Rows kNf4RowsAvx2 = {P::arranged_bytes, P::arrange, P::few_rows};

}  // namespace lofi
