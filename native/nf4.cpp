// What Python calls for 4-bit weights: choosing the path, sharing ranges among threads.
#include <algorithm>
#include <memory>
#include <new>

#include "abi.h"
#include "cpu.h"
#include "nf4.h"
#include "threads.h"

namespace lofi {
namespace {

// Below this many weights a second thread costs more than it does.
constexpr int64_t kWeightsAThread = 16384;

struct Chosen {
  const Nf4Path* path = nullptr;
  const Nf4Rows* rows = nullptr;
};

Chosen path_of(int isa) {
  if (!runs(isa)) return {};
  switch (isa) {
#if defined(__x86_64__)
    case kAvx2: return {&kNf4Avx2, &kNf4RowsAvx2};
    case kAvx512: return {&kNf4Avx512, &kNf4RowsAvx512};
    case kAvx512Bf16: return {&kNf4Avx512, &kNf4RowsAvx512Bf16};  // bf16 instructions do not keep denormals
#elif defined(__aarch64__)
    case kNeon: return {&kNf4Neon, &kNf4RowsNeon};
#endif
    case kPlain: return {&kNf4Plain, &kNf4RowsPlain};
    default: return {};
  }
}

CodeBook book_of(const float* map) {
  CodeBook book;
  for (uint8_t k = 0; k < 16; ++k) book.codes[k] = k;
  std::stable_sort(book.codes, book.codes + 16, [&](uint8_t a, uint8_t b) { return map[a] < map[b]; });
  for (int k = 0; k < 15; ++k) book.middles[k] = (map[book.codes[k]] + map[book.codes[k + 1]]) / 2;
  return book;
}

// Memory for the rearranged rows, kept by each calling thread: a call allocates nothing once it is warm.
uint8_t* scratch(int64_t bytes) {
  constexpr int64_t kLine = 64;
  struct Held {
    std::unique_ptr<uint8_t[]> memory;
    int64_t bytes = 0;
  };
  thread_local Held held;
  if (held.bytes < bytes) {
    held.bytes = 0;
    held.memory.reset(new (std::nothrow) uint8_t[bytes + kLine]);
    if (!held.memory) return nullptr;
    held.bytes = bytes;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(held.memory.get());
  return held.memory.get() + (kLine - address % kLine) % kLine;
}

}  // namespace
}  // namespace lofi

// Elements first .. first + count of the flat weight into out. Exact: bit-equal on every path but for which NaN.
LOFI_EXPORT int lofi_nf4_dequantize(const uint8_t* codes, const void* absmax, const float* nested_absmax,
                                    const float* nested_map, const float* nested_offset, const float* map, int64_t block,
                                    int64_t nested_block, int64_t first, int64_t count, void* out, int dtype, int isa,
                                    int threads) {
  using namespace lofi;
  const Nf4Path* path = path_of(isa).path;
  if (!path) return kNoSuchPath;
  const FourBit weight{codes, absmax, nested_absmax, nested_map, nested_offset, map, block, nested_block};
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  parallel_for(count, kWeightsAThread, threads, [&](int64_t from, int64_t to) {
    path->dequantize(weight, first + from, first + to, static_cast<uint8_t*>(out) + from * size, dtype);
  });
  return kDone;
}

// count elements of x into ceil(count / 2) bytes of codes and ceil(count / block) scales; block is even. Bit-equal.
LOFI_EXPORT int lofi_nf4_quantize(const void* x, int dtype, int64_t count, const float* map, int64_t block,
                                  uint8_t* codes, float* absmax, int isa, int threads) {
  using namespace lofi;
  const Nf4Path* path = path_of(isa).path;
  if (!path) return kNoSuchPath;
  const CodeBook book = book_of(map);
  const int64_t blocks = (count + block - 1) / block;
  parallel_for(blocks, std::max<int64_t>(1, kWeightsAThread / block), threads, [&](int64_t from, int64_t to) {
    path->quantize(x, dtype, count, book, block, codes, absmax, from, to);
  });
  return kDone;
}

// y (rows, outputs) = x (rows, inputs) W^T, both of `dtype`; each thread has a range of outputs.
LOFI_EXPORT int lofi_nf4_few_rows(const uint8_t* codes, const void* absmax, const float* nested_absmax,
                                  const float* nested_map, const float* nested_offset, const float* map, int64_t block,
                                  int64_t nested_block, const void* x, int rows, int64_t inputs, int64_t outputs, void* y,
                                  int dtype, int isa, int threads) {
  using namespace lofi;
  const Nf4Rows* path = path_of(isa).rows;
  if (!path) return kNoSuchPath;
  if (rows < 1 || rows > kMaxRows || inputs < kChunk || inputs % kChunk || block % kChunk) return kNotCovered;
  void* arranged = scratch(path->arranged_bytes(rows, inputs, dtype));
  if (!arranged) return kNotCovered;
  path->arrange(x, rows, inputs, dtype, arranged);
  const FourBit weight{codes, absmax, nested_absmax, nested_map, nested_offset, map, block, nested_block};
  const FewRows job{arranged, rows, inputs, outputs, y};
  parallel_for(outputs, std::max<int64_t>(4, kWeightsAThread / inputs), threads,
               [&](int64_t from, int64_t to) { path->few_rows(weight, job, dtype, from, to); });
  return kDone;
}
