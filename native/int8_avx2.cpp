// Int8 for CPUs with AVX2. |w| as unsigned times x with w's sign as signed: two products of codes up to 127 and 128
// stay below 2^15, so the pairwise sums of vpmaddubsw, which saturate, are exact.
#include <immintrin.h>

#include "int8_blocks.h"
#include "int8_rows.h"

namespace lofi {
namespace {

// The sums of eight registers of int32, in order.
inline __m256i add_across(const __m256i* s) {
  // in each half: sums of 0, 1, 2, 3 and of 4, 5, 6, 7
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(s[4], s[5]), _mm256_hadd_epi32(s[6], s[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

class Avx2Tile {
 public:
  static constexpr int64_t kRows = 1;

  Avx2Tile(const int8_t* const* w, int64_t length) : w_(w), length_(length) {}

  void sums(const int8_t* x, int64_t, int64_t, int32_t* into, int64_t, bool add) const {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i s[kPanel] = {};
    int64_t k = 0;
    for (; k + 32 <= length_; k += 32) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
      for (int j = 0; j < kPanel; ++j) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w_[j] + k));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
        s[j] = _mm256_add_epi32(s[j], _mm256_madd_epi16(pairs, ones));
      }
    }
    alignas(32) int32_t sum[kPanel];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sum), add_across(s));
    for (int j = 0; j < kPanel; ++j) {
      for (int64_t rest = k; rest < length_; ++rest) sum[j] += int32_t{x[rest]} * w_[j][rest];
      into[j] = add ? into[j] + sum[j] : sum[j];
    }
  }

 private:
  const int8_t* const* w_;
  int64_t length_;
};

}  // namespace

const Int8Path kInt8Avx2 = {product<Avx2Tile>, rows, dense};

}  // namespace lofi
