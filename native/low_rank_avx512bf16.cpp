// Low-rank products for CPUs with AVX-512 BF16: x A^T of bf16 in that instruction's pairs, which takes denormals for
// zero. The rest as AVX-512 does it: x A^T stays in float32, so the product with B is no product of bf16.
#include "low_rank_lanes_avx512.h"

namespace lofi {
namespace {

struct Avx512Bf16Lanes : Avx512Lanes {};

template <>
struct Dot<Avx512Bf16Lanes, BFloat16> {
  static constexpr int kStep = 32;
  using Operand = __m512bh;
  static Operand load(const BFloat16* at) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(at)); }
  static __m512 add(Operand x, Operand a, __m512 sum) { return _mm512_dpbf16_ps(sum, x, a); }
};

}  // namespace

const LowRankPath kLowRankAvx512Bf16 = {rows<Avx512Bf16Lanes>};

}  // namespace lofi
