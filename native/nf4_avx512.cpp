// 4-bit kernels in AVX-512 (f, bw, vl, dq).
//
// Look-up: a block's sixteen products map * scale, rounded once, are a table in a register; one permute by the codes
// looks 32 (16-bit) or 16 (float32) weights up. Permutes read only the low bits of an index, so a code needs no masking:
// the 16-bit table is held twice, because there a fifth bit (of the neighbouring code) is read too.
#include "nf4_portable.h"
#include "nf4_table_avx512.h"

namespace lofi {
namespace {

// 32 places in the order of the weights: byte b holds weights b >> 4 and b & 15.
__m512i pairs_of_16(__m128i bytes) {
  const __m512i b = _mm512_cvtepu8_epi32(bytes);
  return _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
}

// The same for 16 places of 32 bits.
__m512i pairs_of_32(__m128i bytes) {
  const __m512i b = _mm512_cvtepu8_epi64(bytes);
  return _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
}

struct Avx512 {
  template <class T>
  static void run(const uint8_t* codes, int64_t i, int64_t count, const float* map, float scale, T* out) {
    const __m256i half = rounded(products(map, scale), T{});
    const __m512i table = _mm512_broadcast_i64x4(half);
    codes += i / 2;
    if (i % 2 && count) {
      alignas(32) T values[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(values), half);
      *out++ = values[*codes++ & 15];
      --count;
    }
    for (; count >= 32; count -= 32, codes += 16, out += 32) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(pairs_of_16(bytes), table));
    }
    if (count) {
      const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << (count + 1) / 2) - 1), codes);
      _mm512_mask_storeu_epi16(out, (__mmask32{1} << count) - 1, _mm512_permutexvar_epi16(pairs_of_16(bytes), table));
    }
  }

  static void run(const uint8_t* codes, int64_t i, int64_t count, const float* map, float scale, float* out) {
    const __m512 table = products(map, scale);
    codes += i / 2;
    if (i % 2 && count) {
      *out++ = map[*codes++ & 15] * scale;
      --count;
    }
    for (; count >= 16; count -= 16, codes += 8, out += 16) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
      _mm512_storeu_ps(out, _mm512_permutexvar_ps(pairs_of_32(bytes), table));
    }
    if (count) {
      const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << (count + 1) / 2) - 1), codes);
      const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
      _mm512_mask_storeu_ps(out, some, _mm512_permutexvar_ps(pairs_of_32(bytes), table));
    }
  }
};

// ---- quantize

__m512 loaded(const float* x, __mmask16 some) { return _mm512_maskz_loadu_ps(some, x); }
template <class T>
__m512 loaded(const T* x, __mmask16 some) {
  return widened(_mm256_maskz_loadu_epi16(some, x), T{});
}

// A binary search: the number of midpoints that are below a value (not at or above it, so that NaN passes them all).
__m512i places(__m512 values, __m512 middles) {
  __m512i at = _mm512_setzero_si512();
  for (int step = 8; step; step /= 2) {
    const __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32(step - 1)), middles);
    const __mmask16 above = _mm512_cmp_ps_mask(middle, values, _CMP_NGE_UQ);
    at = _mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(step));
  }
  return at;
}

__mmask16 first_of(int64_t count) { return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1); }

template <class T>
void quantize_one(const T* x, int64_t count, bool whole, __m512 middles, __m512i order, uint8_t* codes, float* absmax) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_castps_si512(loaded(x + i, first_of(count - i)));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
  }
  const float found = float_of(_mm512_reduce_max_epu32(largest)), divisor = found < kSmallest ? kSmallest : found;
  const __m512 factor = _mm512_set1_ps(1.0f / divisor), by = _mm512_set1_ps(divisor);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = first_of(count - i);
    const __m512 values = loaded(x + i, some);
    const __m512 scaled = whole ? _mm512_maskz_mul_ps(some, values, factor) : _mm512_maskz_div_ps(some, values, by);
    const __m512i code = _mm512_permutexvar_epi32(places(scaled, middles), order);
    const __m512i packed = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
    const __mmask8 bytes = static_cast<__mmask8>((1u << (std::min<int64_t>(16, count - i) + 1) / 2) - 1);
    _mm512_mask_cvtepi64_storeu_epi8(codes + i / 2, bytes, packed);
  }
  *absmax = whole ? found : divisor;
}

template <class T>
void quantize_blocks(const T* x, int64_t count, const CodeBook& book, int64_t block, uint8_t* codes, float* absmax,
                     int64_t first, int64_t last) {
  const __m512 middles = _mm512_maskz_loadu_ps(0x7fff, book.middles);
  const __m512i order = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.codes)));
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * block, size = std::min(block, count - start);
    quantize_one(x + start, size, size == block, middles, order, codes + start / 2, absmax + b);
  }
}

void quantize(const void* x, int dtype, int64_t count, const CodeBook& book, int64_t block, uint8_t* codes, float* absmax,
              int64_t first, int64_t last) {
  with_type(dtype, [&](auto type) {
    quantize_blocks(static_cast<const decltype(type)*>(x), count, book, block, codes, absmax, first, last);
  });
}

using P = Portable<Avx512>;

}  // namespace

const Nf4Path kNf4Avx512 = {P::dequantize, quantize};

}  // namespace lofi
