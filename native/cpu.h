// Which instruction sets this CPU and its operating system run. Knows no kernel.
//
// A path is chosen by the caller and passed to every kernel as a number, so the library keeps no state and a test can run
// each path in one process. Only files whose name ends in a path's suffix (`_avx2.cpp`, see hatch_build.py) are compiled
// for it; they must hold nothing but functions of their own (anonymous namespace or a name of their own): an inline
// function or template with external linkage would be merged with the plain files' copy and run there.
#pragma once

namespace lofi {

// The numbers are part of the ABI: the order of ISAS in src/lofi/quant/kernels/library.py.
enum Isa : int {
  kPlain = 0,
  kAvx2 = 1,        // avx2, fma, f16c
  kAvx512 = 2,      // avx512 f, bw, vl, dq on top
  kAvx512Bf16 = 3,  // avx512 bf16 and vnni on top
  kNeon = 4,
};

struct Features {
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_vnni = false;  // by itself: CPUs with avx512 + vnni and no bf16 exist
  bool avx512_bf16 = false;
  bool neon = false;
};

const Features& cpu();  // asked once, then remembered
bool runs(int isa);     // false for a number that is no path

}  // namespace lofi
