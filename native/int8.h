// The int8 family: what its files share. Weights and activations in row-wise codes (LLM.int8(), arXiv 2208.07339).
//
// int8.cpp exports and chooses; int8_blocks.h and int8_rows.h hold the arithmetic once, as static templates that each
// path's file compiles for its own instruction set; only the innermost tile of sums is written by hand for each.
// Every path gives the same bits: integer sums are exact in any order, and no float sum is reordered.
// Rejected: packing the weight as oneDNN does (slower up to 256 rows, a tenth faster at 1024); keeping the column sums
// of the weight (making them is 1/256 of a large product, and free where memory is the bound).
#pragma once

#include <cstdint>

#include "abi.h"

namespace lofi {

// y = (codes codes^T) (scale_x / 127) (scale_w / 127) + outliers W[:, columns]^T
struct Int8Product {
  const int8_t* x;         // (M, I)
  const float* x_scale;    // (M,)
  const int8_t* w;         // (O, I)
  const float* w_scale;    // (O,)
  const int64_t* columns;  // (U,)
  const float* outliers;   // (M, U)
  const int32_t* sums;     // (M, O): the integer product where another library made it, or null
  void* y;                 // (M, O) of `dtype`
  int64_t m, o, i, u;
  int dtype;
};

// Activations (M, I) with rows `stride` elements apart.
struct Int8Rows {
  const void* x;
  int64_t m, i, stride;
  int dtype;
  float threshold;  // 0: no outliers
  int8_t* codes;    // (M, I)
  float* scale;     // (M,)
  uint8_t* found;   // (I,) or null: set to 1 where a row has an outlier; never cleared
};

// A weight back in a float type.
struct Int8Dense {
  const int8_t* codes;  // (O, I)
  const float* scale;   // (O,)
  void* out;            // (O, I) of `dtype`
  int64_t o, i;
  int dtype;
};

// One path's functions over a part of the work. Scratch holds int8_scratch(product) bytes, aligned to 64.
struct Int8Path {
  void (*product)(const Int8Product&, int64_t first, int64_t last, int threads, char* scratch);
  void (*rows)(const Int8Rows&, int64_t first, int64_t last);
  void (*dense)(const Int8Dense&, int64_t first, int64_t last);
};

// The product is cut into blocks of rows and columns, numbered row of blocks by row of blocks.
constexpr int64_t kBlockRows = 256;   // their codes stay in the second-level cache
constexpr int64_t kBlockDepth = 2048;  // and 8 rows of the weight this long in the first

static inline int64_t int8_block_columns(const Int8Product& p, int threads) {
  return p.o > 128 * threads ? 128 : 64;
}

static inline int64_t int8_blocks(const Int8Product& p, int threads) {
  const int64_t columns = int8_block_columns(p, threads);
  return (p.m + kBlockRows - 1) / kBlockRows * ((p.o + columns - 1) / columns);
}

// Sums, column scales and the outliers' columns of the weight for one block.
static inline int64_t int8_scratch(const Int8Product& p) {
  const int64_t rows = p.m < kBlockRows ? p.m : kBlockRows;
  return 128 * static_cast<int64_t>(sizeof(float)) * (rows + 1 + p.u);
}

extern const Int8Path kInt8Plain;
#if defined(__x86_64__)
extern const Int8Path kInt8Avx2, kInt8Avx512Vnni;
#endif

}  // namespace lofi
