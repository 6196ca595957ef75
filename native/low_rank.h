// The low-rank family: rows of x through the factors of many adapters, each row through its own slot's.
//
// low_rank.cpp exports and chooses; low_rank_rows.h holds the arithmetic once, as templates that each path's file
// compiles for its own instruction set with its own vectors. The specification is adapters/batched_product.py.
// A row has the same bits on a path whatever stands in the other rows and however many threads there are: each sum runs
// over I, and over the ranks, in one order.
#pragma once

#include <cstdint>

#include "abi.h"

namespace lofi {

// The factors of one module in every adapter. The fields are part of the ABI: _Stacks in low_rank_native.py.
struct LowRankStacks {
  const void* a;         // (S, R, I)
  const void* b;         // (S, R, O): transposed, the scale folded in
  const int32_t* ranks;  // (S,): how many of R count
  int64_t slots, rank, inputs, outputs;
  int64_t dtype;  // of a, b, x and out
};

// Rows of x and out, so many elements apart.
struct LowRankRows {
  const void* x;  // (M, I)
  int64_t x_stride;
  const int32_t* slots;  // (M,): -1 is none
  void* out;             // (M, O), added to
  int64_t out_stride;
};

// One path: rows first .. last. Slots and ranks have been checked.
struct LowRankPath {
  void (*rows)(const LowRankStacks&, const LowRankRows&, int64_t first, int64_t last);
};

constexpr int64_t kHeld = 8192;     // numbers of x A^T that are held at once, on the stack
constexpr int64_t kLongestRun = 32;  // rows of one slot that are worked on at once

extern const LowRankPath kLowRankPlain;
#if defined(__x86_64__)
extern const LowRankPath kLowRankAvx2, kLowRankAvx512, kLowRankAvx512Bf16;
#elif defined(__aarch64__)
extern const LowRankPath kLowRankNeon;
#endif

}  // namespace lofi
