// out += (x A^T) B in register tiles of rows by ranks and of rows by columns, once for every path.
// For inclusion in a path's file only: everything is local to that file, compiled for its instruction set.
//
// A path gives `Lanes`: a vector of kWidth floats with load, store, add, fma, sum, and kTile sums that its registers
// hold; and `Dot<Lanes, T>`, where it multiplies some type by other means than as floats.
// Rows that follow each other with one slot (a prompt) are a block, of which each part of A and B is read once from the
// first-level cache; a row alone (a decoded token) is the same with tiles of one row.
// Rejected: sorting rows by slot (a batch's adapters are few rows each: what would be saved is in the cache); asking for
// the next row's factors ahead of time (no faster, whether they are in a cache or not).
#pragma once

#include <cstring>

#include "low_rank.h"
#include "number.h"

namespace lofi {
namespace {

// Not std::min: see cpu.h.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls body(at, Size<n>) for 0..count in pieces of Most, then of each smaller power of two.
template <int Most, class Body>
inline void in_pieces(int64_t count, const Body& body, int64_t at = 0) {
  for (; at + Most <= count; at += Most) body(at, Size<Most>{});
  if constexpr (Most > 1) in_pieces<Most / 2>(count, body, at);
}

// Sums of products over a vector's lanes: as floats, but where a path says otherwise.
template <class Lanes, class T>
struct Dot {
  static constexpr int kStep = Lanes::kWidth;
  using Operand = typename Lanes::V;
  static Operand load(const T* at) { return Lanes::load(at); }
  static typename Lanes::V add(Operand x, Operand a, typename Lanes::V sum) { return Lanes::fma(x, a, sum); }
};

constexpr int most(int tile, int rows) { return tile / rows < 8 ? tile / rows : 8; }

// h (N, K) = x (N, I) A^T for K ranks of A.
template <class Lanes, int N, int K, class T>
inline void shrink(const T* x, int64_t x_stride, const T* a, int64_t inputs, float* h, int64_t h_stride) {
  using D = Dot<Lanes, T>;
  typename Lanes::V sums[N][K];
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) sums[n][k] = Lanes::all(0.0f);
  const auto step = [&](const T* from_x, int64_t apart_x, const T* from_a, int64_t apart_a) {
    typename D::Operand left[N];
    for (int n = 0; n < N; ++n) left[n] = D::load(from_x + n * apart_x);
    for (int k = 0; k < K; ++k) {
      const auto right = D::load(from_a + k * apart_a);
      for (int n = 0; n < N; ++n) sums[n][k] = D::add(left[n], right, sums[n][k]);
    }
  };
  int64_t i = 0;
  for (; i + D::kStep <= inputs; i += D::kStep) step(x + i, x_stride, a + i, inputs);
  if (i < inputs) {
    T rest_x[N][D::kStep] = {}, rest_a[K][D::kStep] = {};
    for (int n = 0; n < N; ++n) std::memcpy(rest_x[n], x + n * x_stride + i, (inputs - i) * sizeof(T));
    for (int k = 0; k < K; ++k) std::memcpy(rest_a[k], a + k * inputs + i, (inputs - i) * sizeof(T));
    step(rest_x[0], D::kStep, rest_a[0], D::kStep);
  }
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) h[n * h_stride + k] = Lanes::sum(sums[n][k]);
}

// out (N, C vectors) += h (N, rank) B, `from` telling where a rank's part of B stands.
template <class Lanes, int N, int C, class T, class From>
inline void expand(const float* h, int64_t h_stride, int64_t rank, const From& from, T* out, int64_t out_stride) {
  using V = typename Lanes::V;
  constexpr int W = Lanes::kWidth;
  V sums[N][C];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) sums[n][c] = Lanes::all(0.0f);
  for (int64_t r = 0; r < rank; ++r) {
    const T* b = from(r);
    V right[C];
    for (int c = 0; c < C; ++c) right[c] = Lanes::load(b + c * W);
    for (int n = 0; n < N; ++n) {
      const V left = Lanes::all(h[n * h_stride + r]);
      for (int c = 0; c < C; ++c) sums[n][c] = Lanes::fma(left, right[c], sums[n][c]);
    }
  }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < C; ++c) {
      T* at = out + n * out_stride + c * W;
      Lanes::store(Lanes::add(Lanes::load(at), sums[n][c]), at);
    }
}

// The last columns, fewer than a vector has.
template <class Lanes, class T>
inline void expand_rest(const float* h, int64_t rank, const T* b, int64_t outputs, T* out, int64_t count) {
  T wide[Lanes::kWidth] = {}, sums[Lanes::kWidth] = {};
  std::memcpy(sums, out, count * sizeof(T));
  const auto from = [&](int64_t r) {
    std::memcpy(wide, b + r * outputs, count * sizeof(T));
    return static_cast<const T*>(wide);
  };
  expand<Lanes, 1, 1>(h, 0, rank, from, sums, 0);
  std::memcpy(out, sums, count * sizeof(T));
}

// `count` rows of one slot.
template <class Lanes, class T>
void block(const LowRankStacks& s, int64_t slot, const T* x, int64_t x_stride, T* out, int64_t out_stride,
           int64_t count) {
  constexpr int kTile = Lanes::kTile, W = Lanes::kWidth;
  alignas(64) float h[kHeld];  // (count, R)
  const int64_t rank = s.ranks[slot], whole = s.outputs / W * W;
  const T* a = static_cast<const T*>(s.a) + slot * s.rank * s.inputs;
  const T* b = static_cast<const T*>(s.b) + slot * s.rank * s.outputs;
  in_pieces<4>(count, [&](int64_t n, auto rows) {
    constexpr int N = decltype(rows)::value;
    in_pieces<most(kTile, N)>(rank, [&](int64_t k, auto ranks) {
      constexpr int K = decltype(ranks)::value;
      shrink<Lanes, N, K>(x + n * x_stride, x_stride, a + k * s.inputs, s.inputs, h + n * s.rank + k, s.rank);
    });
  });
  in_pieces<4>(count, [&](int64_t n, auto rows) {
    constexpr int N = decltype(rows)::value;
    in_pieces<most(kTile, N)>(s.outputs / W, [&](int64_t c, auto columns) {
      constexpr int C = decltype(columns)::value;
      const auto from = [&](int64_t r) { return b + r * s.outputs + c * W; };
      expand<Lanes, N, C>(h + n * s.rank, s.rank, rank, from, out + n * out_stride + c * W, out_stride);
    });
  });
  if (whole < s.outputs)
    for (int64_t n = 0; n < count; ++n)
      expand_rest<Lanes>(h + n * s.rank, rank, b + whole, s.outputs, out + n * out_stride + whole, s.outputs - whole);
}

template <class Lanes>
void rows(const LowRankStacks& s, const LowRankRows& job, int64_t first, int64_t last) {
  const int64_t longest = least(kLongestRun, kHeld / (s.rank > 0 ? s.rank : 1));
  while (first < last) {
    const int32_t slot = job.slots[first];
    int64_t end = first + 1;
    while (end < last && job.slots[end] == slot && end - first < longest) ++end;
    if (slot >= 0 && s.ranks[slot] > 0) {
      with_type(static_cast<int>(s.dtype), [&](auto type) {
        using T = decltype(type);
        const T* x = static_cast<const T*>(job.x) + first * job.x_stride;
        T* out = static_cast<T*>(job.out) + first * job.out_stride;
        block<Lanes, T>(s, slot, x, job.x_stride, out, job.out_stride, end - first);
      });
    }
    first = end;
  }
}

}  // namespace
}  // namespace lofi
