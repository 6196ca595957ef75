// The 4-bit kernels in portable C++, over what a path gives: the loops are the same on every instruction set, the look-up
// of codes is not. A `Path` is a struct of static functions in an anonymous namespace:
//   run(codes, i, count, map, scale, T* out)    out[j] = round(map[code of i + j] * scale), 0 <= j < count
//   chunk(codes, map, scale, T{}, float* out)   the same for kChunk elements from an even place on, back in float
//   madd(a, b, c)                               a * b + c, fused where that is one instruction
#pragma once

#include <algorithm>

#include "nf4.h"
#include "number.h"

namespace lofi {

constexpr int64_t kScales = 64;  // block scales decoded at once

template <class Path, class T>
static void dequantize_range(const FourBit& w, int64_t first, int64_t last, T* out) {
  float scales[kScales];
  for (int64_t i = first; i < last;) {
    const int64_t block = i / w.block, blocks = std::min(kScales, (last - 1) / w.block - block + 1);
    block_scales(w, block, blocks, scales);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t end = std::min(last, (block + k + 1) * w.block);
      Path::run(w.codes, i, end - i, w.map, scales[k], out + (i - first));
      i = end;
    }
  }
}

template <class T>
static inline uint32_t largest_bits(const T* x, int64_t count) {
  uint32_t largest = 0;  // magnitudes order like their bits, and NaN lies above all: it comes through
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(to_float(x[i])) & 0x7fffffffu;
    largest = largest < bits ? bits : largest;
  }
  return largest;
}

constexpr float kSmallest = 1e-38f;   // what a block of zeros is divided by
constexpr int64_t kSearched = 64;     // values whose codes are looked for together, in loops that compilers vectorize

// Codes of up to kSearched values, an even number of them.
static inline void nearest(const float* values, int64_t count, const CodeBook& book, uint8_t* codes) {
  int32_t below[kSearched] = {};
  for (float middle : book.middles)  // NaN is not at or below any: it comes last, as the reference has it
    for (int64_t j = 0; j < kSearched; ++j) below[j] += !(middle >= values[j]);
  for (int64_t j = 0; j < count; j += 2)
    codes[j / 2] = static_cast<uint8_t>(book.codes[below[j]] << 4 | book.codes[below[j + 1]]);
}

template <class T>
static void quantize_block(const T* x, int64_t count, bool whole, const CodeBook& book, uint8_t* codes, float* absmax) {
  const float largest = float_of(largest_bits(x, count)), divisor = largest < kSmallest ? kSmallest : largest;
  const float factor = 1.0f / divisor;
  float values[kSearched];
  for (int64_t i = 0; i < count; i += kSearched) {
    const int64_t some = std::min(kSearched, count - i);
    if (some < kSearched) std::memset(values, 0, sizeof values);  // an odd count is padded with a zero
    for (int64_t j = 0; j < some; ++j) values[j] = to_float(x[i + j]);
    for (int64_t j = 0; j < some; ++j) values[j] = whole ? values[j] * factor : values[j] / divisor;
    nearest(values, some, book, codes + i / 2);
  }
  *absmax = whole ? largest : divisor;
}

template <class T>
static void quantize_range(const T* x, int64_t count, const CodeBook& book, int64_t block, uint8_t* codes, float* absmax,
                           int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * block, size = std::min(block, count - start);
    quantize_block(x + start, size, size == block, book, codes + start / 2, absmax + b);
  }
}

// x as float in the order [chunk][row][kChunk].
template <class T>
static void arrange_rows(const T* x, int rows, int64_t inputs, float* out) {
  for (int64_t c = 0; c < inputs; c += kChunk)
    for (int m = 0; m < rows; ++m)
      for (int64_t j = 0; j < kChunk; ++j) *out++ = to_float(x[m * inputs + c + j]);
}

template <class Path, class T>
static void few_rows_range(const FourBit& w, const FewRows& job, int64_t first, int64_t last) {
  constexpr int kLanes = 16;
  const int64_t chunks = job.inputs / kChunk;
  for (int64_t o = first; o < last; ++o) {
    float sums[kMaxRows][kLanes] = {}, weights[kChunk], scales[kScales];
    const float* x = static_cast<const float*>(job.x);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = o * chunks + c;
      if (c % kScales == 0) chunk_scales(w, at, std::min(kScales, chunks - c), scales);
      Path::chunk(w.codes + at * (kChunk / 2), w.map, scales[c % kScales], T{}, weights);
      for (int m = 0; m < job.rows; ++m, x += kChunk)
        for (int64_t j = 0; j < kChunk; j += kLanes)
          for (int k = 0; k < kLanes; ++k) sums[m][k] = Path::madd(weights[j + k], x[j + k], sums[m][k]);
    }
    for (int m = 0; m < job.rows; ++m) {
      float whole = 0;
      for (float sum : sums[m]) whole += sum;
      round_to(whole, static_cast<T*>(job.y)[m * job.outputs + o]);
    }
  }
}

// The members of Nf4Path by these templates.
template <class Path>
struct Portable {
  static void dequantize(const FourBit& w, int64_t first, int64_t last, void* out, int dtype) {
    with_type(dtype, [&](auto type) { dequantize_range<Path>(w, first, last, static_cast<decltype(type)*>(out)); });
  }

  static void quantize(const void* x, int dtype, int64_t count, const CodeBook& book, int64_t block, uint8_t* codes,
                       float* absmax, int64_t first, int64_t last) {
    with_type(dtype, [&](auto type) {
      quantize_range(static_cast<const decltype(type)*>(x), count, book, block, codes, absmax, first, last);
    });
  }

  static int64_t arranged_bytes(int rows, int64_t inputs, int) { return rows * inputs * int64_t{sizeof(float)}; }

  static void arrange(const void* x, int rows, int64_t inputs, int dtype, void* out) {
    with_type(dtype, [&](auto type) {
      arrange_rows(static_cast<const decltype(type)*>(x), rows, inputs, static_cast<float*>(out));
    });
  }

  static void few_rows(const FourBit& w, const FewRows& job, int dtype, int64_t first, int64_t last) {
    with_type(dtype, [&](auto type) { few_rows_range<Path, decltype(type)>(w, job, first, last); });
  }
};

}  // namespace lofi
