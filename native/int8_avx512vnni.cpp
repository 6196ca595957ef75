// Int8 for CPUs with AVX-512 and VNNI: vpdpbusd multiplies unsigned by signed bytes, so activations are taken plus 128
// and 128 times the sum of the weight's row is taken off again.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says both of its own header's undefined registers
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "int8_blocks.h"
#include "int8_rows.h"

namespace lofi {
namespace {

// Eight sums of one row, by name: GCC keeps an array of this many registers in memory.
struct Eight {
  __m512i s0, s1, s2, s3, s4, s5, s6, s7;
};

inline Eight nothing() {
  const __m512i zero = _mm512_setzero_si512();
  return {zero, zero, zero, zero, zero, zero, zero, zero};
}

// Not the intrinsic: GCC 12 gives its result another register than its sum and spills half of them in a long loop.
inline void multiply_add(__m512i& sum, __m512i a, __m512i w) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));
}

inline __m512i in_halves(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// Each of the eight added up, in order.
inline __m256i add_across(const Eight& s) {
  const __m512i even = in_halves(in_halves(s.s0, s.s4), in_halves(s.s2, s.s6));  // every 128 bits: sums of 0, 2, 4, 6
  const __m512i odd = in_halves(in_halves(s.s1, s.s5), in_halves(s.s3, s.s7));
  const __m512i low = _mm512_unpacklo_epi32(even, odd), high = _mm512_unpackhi_epi32(even, odd);  // 0 .. 3 and 4 .. 7
  const __m256i left = _mm256_add_epi32(_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1));
  const __m256i right = _mm256_add_epi32(_mm512_castsi512_si256(high), _mm512_extracti64x4_epi64(high, 1));
  return _mm256_add_epi32(_mm256_permute2x128_si256(left, right, 0x20), _mm256_permute2x128_si256(left, right, 0x31));
}

// Two rows by eight columns: with three the sums fill all registers, and it measures slower.
class VnniTile {
 public:
  static constexpr int64_t kRows = 2;

  VnniTile(const int8_t* const* w, int64_t length) : length_(length) {
    for (int j = 0; j < kPanel; ++j) w_[j] = w[j];
    Eight s = nothing(), none = s;
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t k = 0; k < length_; k += 64) step<1>(s, none, ones, ones, k, lanes(length_ - k));
    shift_ = _mm256_slli_epi32(add_across(s), 7);
  }

  void sums(const int8_t* x, int64_t x_stride, int64_t rows, int32_t* into, int64_t stride, bool add) const {
    if (rows == 2) sums_of<2>(x, x + x_stride, into, into + stride, add);
    else sums_of<1>(x, x, into, into, add);
  }

 private:
  static __mmask64 lanes(int64_t left) { return left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1; }

  static __m512i shifted(const int8_t* x, __mmask64 mask) {
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x), _mm512_set1_epi8(-128));
  }

  template <int Rows>
  void sums_of(const int8_t* x0, const int8_t* x1, int32_t* into0, int32_t* into1, bool add) const {
    Eight s0 = nothing(), s1 = s0;
    int64_t k = 0;
    for (const __mmask64 all = ~__mmask64{0}; k + 64 <= length_; k += 64)
      step<Rows>(s0, s1, shifted(x0 + k, all), shifted(x1 + k, all), k, all);
    if (const __mmask64 some = lanes(length_ - k); k < length_)
      step<Rows>(s0, s1, shifted(x0 + k, some), shifted(x1 + k, some), k, some);
    store(s0, into0, add);
    if constexpr (Rows == 2) store(s1, into1, add);
  }

  void store(const Eight& s, int32_t* into, bool add) const {
    __m256i* to = reinterpret_cast<__m256i*>(into);
    const __m256i sum = _mm256_sub_epi32(add_across(s), shift_);
    _mm256_storeu_si256(to, add ? _mm256_add_epi32(sum, _mm256_loadu_si256(to)) : sum);
  }

  template <int Rows>
  void step(Eight& s0, Eight& s1, __m512i a0, __m512i a1, int64_t k, __mmask64 mask) const {
    column<Rows>(s0.s0, s1.s0, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[0] + k));
    column<Rows>(s0.s1, s1.s1, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[1] + k));
    column<Rows>(s0.s2, s1.s2, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[2] + k));
    column<Rows>(s0.s3, s1.s3, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[3] + k));
    column<Rows>(s0.s4, s1.s4, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[4] + k));
    column<Rows>(s0.s5, s1.s5, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[5] + k));
    column<Rows>(s0.s6, s1.s6, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[6] + k));
    column<Rows>(s0.s7, s1.s7, a0, a1, _mm512_maskz_loadu_epi8(mask, w_[7] + k));
  }

  template <int Rows>
  static void column(__m512i& s0, __m512i& s1, __m512i a0, __m512i a1, __m512i w) {
    multiply_add(s0, a0, w);
    if constexpr (Rows == 2) multiply_add(s1, a1, w);
  }

  const int8_t* w_[kPanel];
  int64_t length_;
  __m256i shift_;
};

}  // namespace

const Int8Path kInt8Avx512Vnni = {product<VnniTile>, rows, dense};

}  // namespace lofi
