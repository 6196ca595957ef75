// What every exported function shares: the version that Python checks on load, the answers, and the word that exports.
// Raise `kAbi` (and ABI in src/lofi/quant/kernels/library.py) whenever an exported function changes its arguments or its
// meaning: an older library left behind by an editable install is then refused instead of called wrongly.
#pragma once

#include <cstdint>

#define LOFI_EXPORT extern "C" __attribute__((visibility("default")))

namespace lofi {

constexpr int kAbi = 2;

// What an exported kernel returns.
constexpr int kDone = 0;
constexpr int kNotCovered = 1;  // a shape or type this kernel does not do: the caller takes another way
constexpr int kNoSuchPath = 2;  // the instruction set asked for is not on this CPU, or was not compiled
constexpr int kOutOfRange = 3;  // an index among the arguments is out of range: nothing was written

// The element types of tensors that come and go.
constexpr int kFloat32 = 0;
constexpr int kBFloat16 = 1;
constexpr int kFloat16 = 2;

}  // namespace lofi
