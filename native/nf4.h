// A weight in 4-bit codes, and what each path (instruction set) offers for it. The specification is quant/nf4.py.
#pragma once

#include <cstdint>
#include <cstring>

namespace lofi {

// The flat weight: element i = map[code of i] * scale of block i / block, rounded once to the wanted type.
struct FourBit {
  const uint8_t* codes;        // element 2i in the high nibble of byte i, element 2i + 1 in the low one
  const void* absmax;          // float a block; with nested_absmax one byte a block
  const float* nested_absmax;  // null: scales are plain
  const float* nested_map;     // 256 values
  const float* nested_offset;  // one value
  const float* map;            // 16 values
  int64_t block, nested_block;
};

// How the nearest of sixteen values is found: the place among the midpoints of the ascending values, then its code.
struct CodeBook {
  float middles[15];
  uint8_t codes[16];  // codes[k]: the code of the k-th smallest value
};

constexpr int kMaxRows = 16;    // of x, in few_rows
constexpr int64_t kChunk = 64;  // weights that few_rows decodes at once: inputs and block are multiples of it

// Rows of x, rearranged for the path's few_rows: [chunk][row][kChunk], as `arrange` wrote them.
struct FewRows {
  const void* x;
  int rows;
  int64_t inputs, outputs;
  void* y;  // (rows, outputs)
};

// What a path does. Ranges are one thread's share; `first` and `last` count elements, blocks and outputs respectively;
// dtype is one of abi.h's, of `out`, of `x`, of `x` and `y`.
struct Nf4Path {
  void (*dequantize)(const FourBit&, int64_t first, int64_t last, void* out, int dtype);
  void (*quantize)(const void* x, int dtype, int64_t count, const CodeBook&, int64_t block, uint8_t* codes, float* absmax,
                   int64_t first, int64_t last);
};

struct Nf4Rows {
  int64_t (*arranged_bytes)(int rows, int64_t inputs, int dtype);
  void (*arrange)(const void* x, int rows, int64_t inputs, int dtype, void* arranged);
  void (*few_rows)(const FourBit&, const FewRows&, int dtype, int64_t first, int64_t last);
};

extern const Nf4Path kNf4Plain, kNf4Avx2, kNf4Avx512, kNf4Neon;
extern const Nf4Rows kNf4RowsPlain, kNf4RowsAvx2, kNf4RowsAvx512, kNf4RowsAvx512Bf16, kNf4RowsNeon;

// Scales of blocks first .. first + count. Product and sum are rounded separately (-ffp-contract=off).
static inline void block_scales(const FourBit& w, int64_t first, int64_t count, float* out) {
  if (!w.nested_absmax) {
    std::memcpy(out, static_cast<const float*>(w.absmax) + first, count * sizeof(float));
    return;
  }
  const uint8_t* coded = static_cast<const uint8_t*>(w.absmax) + first;
  const float offset = *w.nested_offset;
  for (int64_t done = 0; done < count;) {
    const int64_t of = (first + done) / w.nested_block, end = (of + 1) * w.nested_block - first;
    const float spread = w.nested_absmax[of];
    for (const int64_t stop = end < count ? end : count; done < stop; ++done)
      out[done] = w.nested_map[coded[done]] * spread + offset;
  }
}

// Scales of chunks first .. first + count of kChunk elements; the block is a multiple of kChunk.
static inline void chunk_scales(const FourBit& w, int64_t first, int64_t count, float* out) {
  if (w.block == kChunk) return block_scales(w, first, count, out);
  const int64_t each = w.block / kChunk;
  for (int64_t i = 0; i < count; ++i) block_scales(w, (first + i) / each, 1, out + i);
}

}  // namespace lofi
