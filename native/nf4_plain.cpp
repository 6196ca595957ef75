// 4-bit kernels for any CPU: what the others are tested beside, and what runs where there is no better.
#include "nf4_portable.h"

namespace lofi {
namespace {

struct Plain {
  template <class T>
  static void run(const uint8_t* codes, int64_t i, int64_t count, const float* map, float scale, T* out) {
    T table[16];
    for (int k = 0; k < 16; ++k) round_to(map[k] * scale, table[k]);
    codes += i / 2;
    if (i % 2 && count) {
      *out++ = table[*codes++ & 15];
      --count;
    }
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
      T rounded;
      round_to(map[k] * scale, rounded);
      table[k] = to_float(rounded);
    }
    for (int64_t j = 0; j < kChunk; j += 2, ++codes) {
      out[j] = table[*codes >> 4];
      out[j + 1] = table[*codes & 15];
    }
  }

  static float madd(float a, float b, float c) { return a * b + c; }
};

using P = Portable<Plain>;

}  // namespace

const Nf4Path kNf4Plain = {P::dequantize, P::quantize};
const Nf4Rows kNf4RowsPlain = {P::arranged_bytes, P::arrange, P::few_rows};

}  // namespace lofi
