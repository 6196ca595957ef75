// The int8 family's exported functions: they choose the path, cut the work, and own the scratch.
#include "int8.h"

#include <algorithm>
#include <memory>
#include <new>

#include "abi.h"
#include "cpu.h"
#include "threads.h"

namespace lofi {
namespace {

// AVX-512 without VNNI (Skylake servers) takes AVX2's path.
const Int8Path* path(int isa) {
  if (!runs(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == kAvx512Bf16 || (isa == kAvx512 && cpu().avx512_vnni)) return &kInt8Avx512Vnni;
  if (isa == kAvx512 || isa == kAvx2) return &kInt8Avx2;
#endif
  return &kInt8Plain;
}

bool known(int dtype) { return dtype >= kFloat32 && dtype <= kFloat16; }

// Room for each thread, each part aligned to 64 bytes; null where there is no memory for it.
class Scratch {
 public:
  Scratch(int parts, int64_t bytes) : bytes_((bytes + 63) & ~int64_t{63}) {
    held_.reset(new (std::nothrow) char[static_cast<size_t>(parts * bytes_ + 64)]);
    const auto at = reinterpret_cast<uintptr_t>(held_.get());
    first_ = held_ ? held_.get() + ((64 - at % 64) & 63) : nullptr;
  }

  explicit operator bool() const { return first_ != nullptr; }
  char* of(int part) const { return first_ + part * bytes_; }

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> held_;
  char* first_;
};

// Runs body(first, last, thread) over equal shares of 0..count.
template <class Body>
void share(int64_t count, int threads, const Body& body) {
  struct Work {
    const Body* body;
    int64_t count;
    static void part(void* data, int t, int n) {
      const Work& work = *static_cast<const Work*>(data);
      (*work.body)(work.count * t / n, work.count * (t + 1) / n, t);
    }
  } work{&body, count};
  run_team(threads, &Work::part, &work);
}

int team(int64_t count, int threads) {
  return static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1)));
}

constexpr int64_t kSmall = 1 << 15;  // elements under which a second thread costs more than it does

}  // namespace
}  // namespace lofi

// Codes and scales of activations (M, I), rows `stride` apart; the columns with outliers into `columns` (I,), in order,
// and how many into `count`. `columns` null: no outliers are set apart.
LOFI_EXPORT int lofi_int8_rows(const void* x, int dtype, int64_t m, int64_t i, int64_t stride, float threshold,
                               int8_t* codes, float* scale, int64_t* columns, int64_t* count, int isa, int threads) {
  using namespace lofi;
  const Int8Path* chosen = path(isa);
  if (!chosen) return kNoSuchPath;
  if (!known(dtype)) return kNotCovered;
  threads = m * i < kSmall ? 1 : team(m, threads);
  const Scratch found(threads, i);
  if (!found) return kNotCovered;
  if (columns) std::fill_n(found.of(0), threads > 1 ? found.of(threads) - found.of(0) : i, 0);
  share(m, threads, [&](int64_t first, int64_t last, int thread) {
    uint8_t* mine = columns ? reinterpret_cast<uint8_t*>(found.of(thread)) : nullptr;
    chosen->rows(Int8Rows{x, m, i, stride, dtype, threshold, codes, scale, mine}, first, last);
  });
  if (!columns) return kDone;
  for (int t = 1; t < threads; ++t)
    for (int64_t c = 0; c < i; ++c) found.of(0)[c] |= found.of(t)[c];
  *count = 0;
  for (int64_t c = 0; c < i; ++c)
    if (found.of(0)[c]) columns[(*count)++] = c;
  return kDone;
}

// y (M, O) from codes; `sums` (M, O) is the integer product where another library has made it, else null.
LOFI_EXPORT int lofi_int8_product(const int8_t* x, const float* x_scale, const int8_t* w, const float* w_scale,
                                  const int64_t* columns, const float* outliers, const int32_t* sums, void* y,
                                  int dtype, int64_t m, int64_t o, int64_t i, int64_t u, int isa, int threads) {
  using namespace lofi;
  const Int8Path* chosen = path(isa);
  if (!chosen) return kNoSuchPath;
  if (!known(dtype)) return kNotCovered;
  if (m == 0 || o == 0) return kDone;
  const Int8Product p{x, x_scale, w, w_scale, columns, outliers, sums, y, m, o, i, u, dtype};
  threads = m * o * i < kSmall ? 1 : threads;
  const int64_t blocks = int8_blocks(p, threads);
  const int crew = team(blocks, threads);
  const Scratch scratch(crew, int8_scratch(p));
  if (!scratch) return kNotCovered;
  share(blocks, crew, [&](int64_t first, int64_t last, int thread) {
    chosen->product(p, first, last, threads, scratch.of(thread));
  });
  return kDone;
}

// out (O, I) = codes * (scale / 127).
LOFI_EXPORT int lofi_int8_dense(const int8_t* codes, const float* scale, void* out, int dtype, int64_t o, int64_t i,
                                int isa, int threads) {
  using namespace lofi;
  const Int8Path* chosen = path(isa);
  if (!chosen) return kNoSuchPath;
  if (!known(dtype)) return kNotCovered;
  share(o, o * i < kSmall ? 1 : team(o, threads), [&](int64_t first, int64_t last, int) {
    chosen->dense(Int8Dense{codes, scale, out, o, i, dtype}, first, last);
  });
  return kDone;
}
