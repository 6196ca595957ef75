// Low-rank products for any CPU, in vectors of four floats that compilers make of what the architecture has.
#include "low_rank_rows.h"

namespace lofi {
namespace {

struct PlainLanes {
  using V = float __attribute__((vector_size(16)));
  static constexpr int kWidth = 4, kTile = 8;
  static V all(float value) { return V{value, value, value, value}; }
  static V add(V a, V b) { return a + b; }
  static V fma(V a, V b, V sum) { return sum + a * b; }
  static float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  template <class T>
  static V load(const T* at) {
    return V{to_float(at[0]), to_float(at[1]), to_float(at[2]), to_float(at[3])};
  }
  template <class T>
  static void store(V v, T* at) {
    for (int i = 0; i < kWidth; ++i) round_to(v[i], at[i]);
  }
};

}  // namespace

const LowRankPath kLowRankPlain = {rows<PlainLanes>};

}  // namespace lofi
