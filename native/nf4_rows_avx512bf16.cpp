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

#define INLINED inline __attribute__((always_inline))

// Sums and codes by name, one inside the other: GCC keeps an array of them in memory, where each multiply-add would load
// and store its sum (twice the time with 16 rows).
template <int R>
struct Codes {
  __m512i even, odd;
  Codes<R - 1> next;
};
template <>
struct Codes<0> {};

template <int R>
struct Sums {
  __m512 sum = _mm512_setzero_ps();
  Sums<R - 1> next;
};
template <>
struct Sums<0> {};

template <int M, int R>
struct Tile {
  Sums<R> row;
  Tile<M - 1, R> next;
};
template <int R>
struct Tile<0, R> {};

// Not the intrinsic: GCC 12 gives its result another register than its sum and moves half of them about.
INLINED void multiply_add(__m512& sum, __m512i w, __m512i x) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

template <int R>
INLINED void multiply_add(Sums<R>& row, const Codes<R>& w, __m512i first, __m512i second) {
  multiply_add(row.sum, w.even, first);
  multiply_add(row.sum, w.odd, second);
  if constexpr (R > 1) multiply_add(row.next, w.next, first, second);
}

template <int M, int R>
INLINED void multiply_add(Tile<M, R>& tile, const Codes<R>& w, const uint16_t* x) {
  multiply_add(tile.row, w, _mm512_load_si512(x), _mm512_load_si512(x + 32));
  if constexpr (M > 1) multiply_add(tile.next, w, x + kChunk);
}

// The weights of one chunk of R outputs, whose codes are row_bytes and whose scales are kScalesHeld apart.
template <int R>
INLINED void decode(Codes<R>& w, const float* map, const float* scale, const uint8_t* codes, int64_t row_bytes) {
  const __m256bh table = _mm512_cvtneps_pbh(products(map, *scale));
  const __m512i twice = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(table));
  const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  w.even = _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), twice);
  w.odd = _mm512_permutexvar_epi16(b, twice);
  if constexpr (R > 1) decode(w.next, map, scale + kScalesHeld, codes + row_bytes, row_bytes);
}

template <int R>
INLINED void store(const Sums<R>& row, BFloat16* y) {
  round_to(_mm512_reduce_add_ps(row.sum), *y);
  if constexpr (R > 1) store(row.next, y + 1);
}

template <int M, int R>
INLINED void store(const Tile<M, R>& tile, BFloat16* y, int64_t outputs) {
  store(tile.row, y);
  if constexpr (M > 1) store(tile.next, y + outputs, outputs);
}

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
    Tile<M, R> tile;
    for (int64_t c = 0; c < chunks; ++c, x += M * kChunk, codes += kChunk / 2) {
      refill<R>(w, output, c, chunks, scales);
      // The next tile's: rows are short streams, which the processor's own prefetching loses again and again.
      for (int r = 0; r < R; ++r) _mm_prefetch(codes + (R + r) * row_bytes, _MM_HINT_T0);
      Codes<R> decoded;
      decode(decoded, w.map, scales[0] + c % kScalesHeld, codes, row_bytes);
      multiply_add(tile, decoded, x);
    }
    store(tile, static_cast<Result*>(job.y) + output, job.outputs);
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
