// How few_rows is cut into tiles that fit 32 vector registers: up to Tile::kRows rows of x by R outputs.
//
// The number of rows is known when compiled, so sums stay in registers. More rows go in groups of nearly equal size, each
// group a turn over the same few outputs: a turn's x then stays in the first-level cache, which is worth decoding the
// codes once a group (16 rows at once, with x streaming from the second level, took twice as long; so kRows rows of 2048
// inputs are 32 KB).
#pragma once

#include <algorithm>
#include <utility>

#include "nf4.h"

namespace lofi {

constexpr int64_t kScalesHeld = 32;  // block scales decoded at once for each output of a tile

// Decodes the next scales of outputs output .. output + R when chunk c begins a new group of them.
template <int R>
static inline void refill(const FourBit& w, int64_t output, int64_t c, int64_t chunks, float (&scales)[R][kScalesHeld]) {
  if (c % kScalesHeld) return;
  for (int r = 0; r < R; ++r)
    chunk_scales(w, (output + r) * chunks + c, std::min(kScalesHeld, chunks - c), scales[r]);
}

constexpr int64_t kTurn = 64;  // outputs that one group does before the next: their codes stay in the second-level cache

constexpr int outputs_a_tile(int rows) { return rows <= 4 ? 4 : 2; }

// Calls body(first, count) for each group of rows.
template <class Tile, class Body>
static void in_groups(int rows, const Body& body) {
  const int groups = (rows + Tile::kRows - 1) / Tile::kRows;
  for (int g = 0; g < groups; ++g) body(rows * g / groups, rows * (g + 1) / groups - rows * g / groups);
}

template <class Tile, int M>
static void with_rows(const FourBit& w, const FewRows& job, int64_t first, int64_t last) {
  constexpr int R = outputs_a_tile(M);
  for (; first + R <= last; first += R) Tile::template run<M, R>(w, job, first);
  for (; first < last; ++first) Tile::template run<M, 1>(w, job, first);
}

template <class Tile, int... M>
static void choose_rows(const FourBit& w, const FewRows& job, int64_t first, int64_t last, std::integer_sequence<int, M...>) {
  (void)((job.rows == M + 1 && (with_rows<Tile, M + 1>(w, job, first, last), true)) || ...);
}

// Calls Tile::run<M, R>(w, group, output) for all outputs first .. last; x is [group][chunk][row of it][kChunk].
template <class Tile>
static void in_tiles(const FourBit& w, const FewRows& job, int64_t first, int64_t last) {
  const auto* x = static_cast<const typename Tile::Held*>(job.x);
  auto* y = static_cast<typename Tile::Result*>(job.y);
  for (; first < last; first += kTurn) {
    in_groups<Tile>(job.rows, [&](int row, int rows) {
      const FewRows group{x + row * job.inputs, rows, job.inputs, job.outputs, y + row * job.outputs};
      const int64_t end = std::min(last, first + kTurn);
      choose_rows<Tile>(w, group, first, end, std::make_integer_sequence<int, Tile::kRows>{});
    });
  }
}

// Calls body(from, to) for each chunk of each row, in the order in which tiles read them.
template <class Tile, class T, class Body>
static void arrange_chunks(const T* x, int rows, int64_t inputs, typename Tile::Held* out, const Body& body) {
  in_groups<Tile>(rows, [&](int row, int count) {
    for (int64_t c = 0; c < inputs; c += kChunk)
      for (int m = row; m < row + count; ++m, out += kChunk) body(x + m * inputs + c, out);
  });
}

}  // namespace lofi
