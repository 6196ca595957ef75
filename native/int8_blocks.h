// The int8 product in blocks, once for every path. A path gives `Tile`: sums of 8 columns by up to Tile::kRows rows.
// For inclusion in a path's file only: everything is local to that file, compiled for its instruction set.
#pragma once

#include <cstring>

#include "int8.h"
#include "int8_types.h"

namespace lofi {
namespace {

constexpr int64_t kPanel = 8;  // columns of a tile
constexpr int64_t kChunk = 64;  // columns that are finished at once
using Wide = float __attribute__((vector_size(64), may_alias));

// Not std::min, nor anything else of the standard library that might not be inlined: see cpu.h.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Block {
  int64_t row, rows, column, columns, stride;
  int32_t* sums;    // (rows, stride)
  float* w_scale;   // (stride,): scale / 127
  float* outliers;  // (U, stride): dequantized columns of the weight
};

template <class Tile>
void integer_sums(const Int8Product& p, const Block& b) {
  for (int64_t depth = 0; depth < p.i; depth += kBlockDepth) {
    const int64_t length = least(kBlockDepth, p.i - depth);
    for (int64_t panel = 0; panel < b.columns; panel += kPanel) {
      const int8_t* w[kPanel];
      for (int64_t j = 0; j < kPanel; ++j)  // past the edge the last column again, whose sums nobody reads
        w[j] = p.w + least(b.column + panel + j, p.o - 1) * p.i + depth;
      const Tile tile(w, length);
      for (int64_t r = 0; r < b.rows; r += Tile::kRows)
        tile.sums(p.x + (b.row + r) * p.i + depth, p.i, least(Tile::kRows, b.rows - r),
                  b.sums + r * b.stride + panel, b.stride, depth != 0);
    }
  }
}

inline void copy_sums(const Int8Product& p, const Block& b) {
  for (int64_t r = 0; r < b.rows; ++r)
    std::memcpy(b.sums + r * b.stride, p.sums + (b.row + r) * p.o + b.column, b.columns * sizeof(int32_t));
}

inline void gather(const Int8Product& p, const Block& b) {
  for (int64_t j = 0; j < b.stride; ++j) {
    const int64_t column = least(b.column + j, p.o - 1);
    b.w_scale[j] = p.w_scale[column] * (1.0f / 127.0f);
    const int8_t* w = p.w + column * p.i;
    for (int64_t u = 0; u < p.u; ++u) b.outliers[u * b.stride + j] = static_cast<float>(w[p.columns[u]]) * b.w_scale[j];
  }
}

// kChunk columns of one row. Only the row's own outliers are added, in the order of columns: a row alone gives the same
// bits. Rejected: the outliers of all rows as one dense product (its sums depend on the other rows' outliers).
inline void finish_chunk(const Int8Product& p, const Block& b, int64_t r, int64_t chunk, float* into) {
  const float scale = p.x_scale[b.row + r] * (1.0f / 127.0f);
  const int32_t* sums = b.sums + r * b.stride + chunk;
  for (int j = 0; j < kChunk; ++j) into[j] = static_cast<float>(sums[j]) * scale * b.w_scale[chunk + j];
  if (p.u) {
    const float* outliers = p.outliers + (b.row + r) * p.u;
    const auto* w = reinterpret_cast<const Wide*>(b.outliers + chunk);
    Wide t0{}, t1{}, t2{}, t3{};
    for (int64_t u = 0; u < p.u; ++u, w += b.stride / 16) {
      const float value = outliers[u];
      if (value == 0.0f) continue;
      t0 += value * w[0], t1 += value * w[1], t2 += value * w[2], t3 += value * w[3];
    }
    for (int j = 0; j < 16; ++j) into[j] += t0[j], into[16 + j] += t1[j], into[32 + j] += t2[j], into[48 + j] += t3[j];
  }
}

template <class Float>
void finish(const Int8Product& p, const Block& b) {
  alignas(64) float chunk[kChunk];
  alignas(64) typename Float::Bits narrow[kChunk];
  for (int64_t r = 0; r < b.rows; ++r) {
    auto* y = static_cast<typename Float::Bits*>(p.y) + (b.row + r) * p.o + b.column;
    for (int64_t c = 0; c < b.columns; c += kChunk) {
      finish_chunk(p, b, r, c, chunk);
      for (int j = 0; j < kChunk; ++j) narrow[j] = Float::narrow(chunk[j]);
      std::memcpy(y + c, narrow, least(kChunk, b.columns - c) * sizeof *narrow);
    }
  }
}

template <class Tile>
void product(const Int8Product& p, int64_t first, int64_t last, int threads, char* scratch) {
  const int64_t stride = int8_block_columns(p, threads), across = (p.o + stride - 1) / stride;
  float* room = reinterpret_cast<float*>(scratch);
  for (int64_t block = first; block < last; ++block) {
    Block b{};
    b.row = block / across * kBlockRows, b.rows = least(kBlockRows, p.m - b.row);
    b.column = block % across * stride, b.columns = least(stride, p.o - b.column), b.stride = stride;
    b.w_scale = room, b.outliers = room + stride;
    b.sums = reinterpret_cast<int32_t*>(room + (1 + p.u) * stride);
    if (p.sums) copy_sums(p, b);
    else integer_sums<Tile>(p, b);
    gather(p, b);
    if (p.dtype == kFloat32) finish<AsFloat32>(p, b);
    else if (p.dtype == kBFloat16) finish<AsBFloat16>(p, b);
    else finish<AsFloat16>(p, b);
  }
}

}  // namespace
}  // namespace lofi
