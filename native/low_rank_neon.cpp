// Low-rank products for arm64.
#include <arm_neon.h>

#include "low_rank_rows.h"

namespace lofi {
namespace {

struct NeonLanes {
  using V = float32x4_t;
  static constexpr int kWidth = 4, kTile = 16;
  static V all(float value) { return vdupq_n_f32(value); }
  static V add(V a, V b) { return vaddq_f32(a, b); }
  static V fma(V a, V b, V sum) { return vfmaq_f32(sum, a, b); }
  static float sum(V v) { return vaddvq_f32(v); }

  static const uint16_t* bits(const void* at) { return static_cast<const uint16_t*>(at); }
  static V load(const float* at) { return vld1q_f32(at); }
  static V load(const BFloat16* at) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(bits(at)), 16)); }
  static V load(const Float16* at) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits(at)))); }

  static void store(V v, float* at) { vst1q_f32(at, v); }
  template <class T>
  static void store(V v, T* at) {
    float values[kWidth];
    vst1q_f32(values, v);
    for (int i = 0; i < kWidth; ++i) round_to(values[i], at[i]);
  }
};

}  // namespace

const LowRankPath kLowRankNeon = {rows<NeonLanes>};

}  // namespace lofi
