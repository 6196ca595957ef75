// Few rows of x times a 4-bit weight in AVX-512, sums in float32 by fused multiply-add.
//
// Weights are looked up as their high and low nibbles come, that is those at even and at odd places apart; x is
// rearranged once to match, as the order of a sum's terms is free. A tile of outputs shares each load of x.
#include <utility>

#include "nf4.h"
#include "nf4_rows_tiles.h"
#include "nf4_table_avx512.h"

namespace lofi {
namespace {

template <class T>
struct Avx512Tile {
  static constexpr int kRows = 4;
  using Held = float;
  using Result = T;

  template <int M, int R>
  static void run(const FourBit& w, const FewRows& job, int64_t output) {
    const int64_t chunks = job.inputs / kChunk;
    const Held* x = static_cast<const Held*>(job.x);
    float scales[R][kScalesHeld];
    __m512 sums[R][M];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; ++c, x += M * kChunk) {
      refill<R>(w, output, c, chunks, scales);
      const uint8_t* codes = w.codes + (output * chunks + c) * (kChunk / 2);
      __m512 tables[R];
      for (int r = 0; r < R; ++r) tables[r] = table_of(w.map, scales[r][c % kScalesHeld], T{});
      for (int half = 0; half < 2; ++half) {
        __m512 even[R], odd[R];
        for (int r = 0; r < R; ++r) {
          const uint8_t* from = codes + r * chunks * (kChunk / 2) + half * 16;
          const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
          even[r] = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), tables[r]);
          odd[r] = _mm512_permutexvar_ps(b, tables[r]);
        }
        for (int m = 0; m < M; ++m) {
          const __m512 first = _mm512_load_ps(x + m * kChunk + half * 32), second = _mm512_load_ps(x + m * kChunk + half * 32 + 16);
          for (int r = 0; r < R; ++r) {
            sums[r][m] = _mm512_fmadd_ps(even[r], first, sums[r][m]);
            sums[r][m] = _mm512_fmadd_ps(odd[r], second, sums[r][m]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        round_to(_mm512_reduce_add_ps(sums[r][m]), static_cast<Result*>(job.y)[m * job.outputs + output + r]);
  }
};

__m512 widened16(const float* x) { return _mm512_loadu_ps(x); }
template <class T>
__m512 widened16(const T* x) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), T{});
}

template <class T>
void arrange_as(const T* x, int rows, int64_t inputs, float* out) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  arrange_chunks<Avx512Tile<T>>(x, rows, inputs, out, [&](const T* from, float* to) {
    for (int64_t j = 0; j < kChunk; j += 32) {
      const __m512 a = widened16(from + j), b = widened16(from + j + 16);
      _mm512_store_ps(to + j, _mm512_permutex2var_ps(a, evens, b));
      _mm512_store_ps(to + j + 16, _mm512_permutex2var_ps(a, odds, b));
    }
  });
}

int64_t arranged_bytes(int rows, int64_t inputs, int) { return rows * inputs * int64_t{sizeof(float)}; }

void arrange(const void* x, int rows, int64_t inputs, int dtype, void* out) {
  with_type(dtype, [&](auto type) {
    arrange_as(static_cast<const decltype(type)*>(x), rows, inputs, static_cast<float*>(out));
  });
}

void few_rows(const FourBit& w, const FewRows& job, int dtype, int64_t first, int64_t last) {
  with_type(dtype, [&](auto type) { in_tiles<Avx512Tile<decltype(type)>>(w, job, first, last); });
}

}  // namespace

const Nf4Rows kNf4RowsAvx512 = {arranged_bytes, arrange, few_rows};

}  // namespace lofi
