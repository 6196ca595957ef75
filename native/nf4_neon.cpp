// 4-bit kernels in NEON (64-bit ARM).
//
// Look-up: a block's sixteen products, rounded once, as planes of sixteen bytes that a table instruction looks up, a
// plane a byte of the result; interleaving stores put the planes together again.
#include <arm_neon.h>

#include "nf4_portable.h"

namespace lofi {
namespace {

template <class T>
struct Planes {  // byte p of each of the table's sixteen values
  uint8x16_t plane[sizeof(T)];

  explicit Planes(const T* table) {
    uint8_t bytes[16 * sizeof(T)], apart[sizeof(T)][16];
    std::memcpy(bytes, table, sizeof bytes);
    for (size_t p = 0; p < sizeof(T); ++p) {
      for (int k = 0; k < 16; ++k) apart[p][k] = bytes[k * sizeof(T) + p];
      plane[p] = vld1q_u8(apart[p]);
    }
  }
};

void store_sixteen(const Planes<float>& table, uint8x16_t places, float* out) {
  uint8x16x4_t bytes;
  for (int p = 0; p < 4; ++p) bytes.val[p] = vqtbl1q_u8(table.plane[p], places);
  vst4q_u8(reinterpret_cast<uint8_t*>(out), bytes);
}

template <class T>
void store_sixteen(const Planes<T>& table, uint8x16_t places, T* out) {
  const uint8x16x2_t bytes = {{vqtbl1q_u8(table.plane[0], places), vqtbl1q_u8(table.plane[1], places)}};
  vst2q_u8(reinterpret_cast<uint8_t*>(out), bytes);
}

template <class T>
void store_thirty_two(const Planes<T>& table, const uint8_t* codes, T* out) {
  const uint8x16_t b = vld1q_u8(codes), even = vshrq_n_u8(b, 4), odd = vandq_u8(b, vdupq_n_u8(15));
  store_sixteen(table, vzip1q_u8(even, odd), out);
  store_sixteen(table, vzip2q_u8(even, odd), out + 16);
}

struct Neon {
  template <class T>
  static void run(const uint8_t* codes, int64_t i, int64_t count, const float* map, float scale, T* out) {
    T table[16];
    for (int k = 0; k < 16; ++k) round_to(map[k] * scale, table[k]);
    const Planes<T> planes(table);
    codes += i / 2;
    if (i % 2 && count) {
      *out++ = table[*codes++ & 15];
      --count;
    }
    for (; count >= 32; count -= 32, codes += 16, out += 32) store_thirty_two(planes, codes, out);
    for (; count >= 2; count -= 2, ++codes, out += 2) {
      out[0] = table[*codes >> 4];
      out[1] = table[*codes & 15];
    }
    if (count) *out = table[*codes >> 4];
  }

  template <class T>
  static void chunk(const uint8_t* codes, const float* map, float scale, T, float* out) {
    float table[16];
    for (int k = 0; k < 16; ++k) {
      T once;
      round_to(map[k] * scale, once);
      table[k] = to_float(once);
    }
    const Planes<float> planes(table);
    for (int64_t j = 0; j < kChunk; j += 32, codes += 16) store_thirty_two(planes, codes, out + j);
  }

  static float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};

using P = Portable<Neon>;

}  // namespace

const Nf4Path kNf4Neon = {P::dequantize, P::quantize};
const Nf4Rows kNf4RowsNeon = {P::arranged_bytes, P::arrange, P::few_rows};

}  // namespace lofi
