// Low-rank products for CPUs with AVX-512.
#include "low_rank_lanes_avx512.h"

namespace lofi {

const LowRankPath kLowRankAvx512 = {rows<Avx512Lanes>};

}  // namespace lofi
