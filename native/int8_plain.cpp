// Int8 for any CPU: plain sums, which compilers turn into the vector code that every CPU of the architecture runs (NEON
// on arm64, SSE2 on x86-64).
#include "int8_blocks.h"
#include "int8_rows.h"

namespace lofi {
namespace {

class PlainTile {
 public:
  static constexpr int64_t kRows = 1;

  PlainTile(const int8_t* const* w, int64_t length) : w_(w), length_(length) {}

  void sums(const int8_t* x, int64_t, int64_t, int32_t* into, int64_t, bool add) const {
    for (int64_t j = 0; j < kPanel; ++j) {
      const int8_t* w = w_[j];
      int32_t sum = 0;
      for (int64_t k = 0; k < length_; ++k) sum += static_cast<int16_t>(x[k]) * static_cast<int16_t>(w[k]);
      into[j] = add ? into[j] + sum : sum;
    }
  }

 private:
  const int8_t* const* w_;
  int64_t length_;
};

}  // namespace

const Int8Path kInt8Plain = {product<PlainTile>, rows, dense};

}  // namespace lofi
