// What Python calls for the product of many adapters: checking slots, choosing the path, sharing rows among threads.
#include "low_rank.h"

#include <algorithm>

#include "abi.h"
#include "cpu.h"
#include "threads.h"

namespace lofi {
namespace {

// Multiplications under which a second thread costs more than it does; a decoded token of a small model has fewer.
constexpr int64_t kAThread = 1 << 15;

const LowRankPath* path_of(int isa) {
  if (!runs(isa)) return nullptr;
  switch (isa) {
#if defined(__x86_64__)
    case kAvx2: return &kLowRankAvx2;
    case kAvx512: return &kLowRankAvx512;
    case kAvx512Bf16: return &kLowRankAvx512Bf16;
#elif defined(__aarch64__)
    case kNeon: return &kLowRankNeon;
#endif
    default: return &kLowRankPlain;
  }
}

// The ranks of all rows together; -1 where a slot or its rank is out of range.
int64_t ranks_of(const LowRankStacks& s, const int32_t* slots, int64_t m) {
  int64_t ranks = 0;
  for (int64_t row = 0; row < m; ++row) {
    const int64_t slot = slots[row];
    if (slot == -1) continue;
    if (slot < 0 || slot >= s.slots || s.ranks[slot] < 0 || s.ranks[slot] > s.rank) return -1;
    ranks += s.ranks[slot];
  }
  return ranks;
}

}  // namespace
}  // namespace lofi

// out (M, O) += each row of x (M, I) through its slot's factors; rows of them are `x_stride` and `out_stride` apart.
LOFI_EXPORT int lofi_low_rank(const lofi::LowRankStacks* stacks, const void* x, int64_t x_stride, const int32_t* slots,
                              void* out, int64_t out_stride, int64_t m, int isa, int threads) {
  using namespace lofi;
  const LowRankPath* path = path_of(isa);
  if (!path) return kNoSuchPath;
  if (stacks->dtype < kFloat32 || stacks->dtype > kFloat16 || stacks->rank > kHeld) return kNotCovered;
  const int64_t ranks = ranks_of(*stacks, slots, m);
  if (ranks < 0) return kOutOfRange;
  if (ranks == 0) return kDone;
  const int64_t a_row = std::max<int64_t>(1, ranks * (stacks->inputs + stacks->outputs) / m);
  const LowRankRows job{x, x_stride, slots, out, out_stride};
  parallel_for(m, (kAThread + a_row - 1) / a_row, threads,
               [&](int64_t first, int64_t last) { path->rows(*stacks, job, first, last); });
  return kDone;
}
