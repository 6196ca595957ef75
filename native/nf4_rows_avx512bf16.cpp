// Few rows of bf16 x times a 4-bit weight by the bf16 dot product; other types go the AVX-512 way.
//
// vdpbf16ps multiplies exactly, adds in float32 to nearest even, and takes denormals (inputs, sums) for zero: each output
// differs from the exact sum of its I products by at most I * 2^-24 * sum |x w| + 2^-126 * sum (1 + |x| + |w|), and is
// then rounded once. So the rounding instruction, which takes denormals for zero too, is good enough for the table here.
// Weights come 32 at a time from one permute: see nf4_avx512.cpp for the table, nf4_rows_avx512.cpp for even and odd.
#include <utility>

#include "nf4.h"
#include "nf4_rows_tiles.h"
#include "nf4_table_avx512.h"

namespace lofi {
namespace {

__m512bh pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }

struct Bf16Tile {
  static constexpr int kRows = 8;
  using Held = uint16_t;
  using Result = BFloat16;

  template <int M, int R>
  static void run(const FourBit& w, const FewRows& job, int64_t output) {
    const int64_t chunks = job.inputs / kChunk, row_bytes = chunks * (kChunk / 2);
    const Held* x = static_cast<const Held*>(job.x);
    const uint8_t* codes = w.codes + output * row_bytes;
    float scales[R][kScalesHeld];
    __m512 sums[R][M];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; ++c, x += M * kChunk, codes += kChunk / 2) {
      refill<R>(w, output, c, chunks, scales);
      __m512bh even[R], odd[R];
      for (int r = 0; r < R; ++r) {
        const __m256bh table = _mm512_cvtneps_pbh(products(w.map, scales[r][c % kScalesHeld]));
        const __m512i twice = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(table));
        const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + r * row_bytes)));
        even[r] = pairs(_mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), twice));
        odd[r] = pairs(_mm512_permutexvar_epi16(b, twice));
      }
      for (int m = 0; m < M; ++m) {
        const __m512bh first = pairs(_mm512_load_si512(x + m * kChunk)), second = pairs(_mm512_load_si512(x + m * kChunk + 32));
        for (int r = 0; r < R; ++r) {
          sums[r][m] = _mm512_dpbf16_ps(sums[r][m], even[r], first);
          sums[r][m] = _mm512_dpbf16_ps(sums[r][m], odd[r], second);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        round_to(_mm512_reduce_add_ps(sums[r][m]), static_cast<Result*>(job.y)[m * job.outputs + output + r]);
  }
};

void arrange_bf16(const uint16_t* x, int rows, int64_t inputs, uint16_t* out) {
  alignas(64) uint16_t places[32];
  for (uint16_t k = 0; k < 32; ++k) places[k] = 2 * k;
  const __m512i evens = _mm512_load_si512(places), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  arrange_chunks<Bf16Tile>(x, rows, inputs, out, [&](const uint16_t* from, uint16_t* to) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32);
    _mm512_store_si512(to, _mm512_permutex2var_epi16(a, evens, b));
    _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(a, odds, b));
  });
}

int64_t arranged_bytes(int rows, int64_t inputs, int dtype) {
  return dtype == kBFloat16 ? rows * inputs * int64_t{2} : kNf4RowsAvx512.arranged_bytes(rows, inputs, dtype);
}

void arrange(const void* x, int rows, int64_t inputs, int dtype, void* out) {
  if (dtype != kBFloat16) return kNf4RowsAvx512.arrange(x, rows, inputs, dtype, out);
  arrange_bf16(static_cast<const uint16_t*>(x), rows, inputs, static_cast<uint16_t*>(out));
}

void few_rows(const FourBit& w, const FewRows& job, int dtype, int64_t first, int64_t last) {
  if (dtype != kBFloat16) return kNf4RowsAvx512.few_rows(w, job, dtype, first, last);
  in_tiles<Bf16Tile>(w, job, first, last);
}

}  // namespace

const Nf4Rows kNf4RowsAvx512Bf16 = {arranged_bytes, arrange, few_rows};

}  // namespace lofi
