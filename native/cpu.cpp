#include "cpu.h"

#include <cstdint>

#include "abi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lofi {
namespace {

#if defined(__x86_64__)

constexpr bool bit(uint32_t word, int which) { return (word >> which) & 1u; }

// The register state that the operating system saves, without which wide registers trap.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

Features ask() {
  Features found;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const uint64_t state = saved_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31), vnni = bit(c, 11);
  found.avx2 = ymm && fma && f16c && bit(b, 5);
  found.avx512 = found.avx2 && zmm && f && dq && bw && vl;
  found.avx512_vnni = found.avx512 && vnni;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = found.avx512_vnni && bit(a, 5);
  return found;
}

#else

Features ask() {
  Features found;
#if defined(__aarch64__)
  found.neon = true;  // part of the base architecture
#endif
  return found;
}

#endif

}  // namespace

const Features& cpu() {
  static const Features found = ask();
  return found;
}

bool runs(int isa) {
  switch (isa) {
    case kPlain: return true;
    case kAvx2: return cpu().avx2;
    case kAvx512: return cpu().avx512;
    case kAvx512Bf16: return cpu().avx512_bf16;
    case kNeon: return cpu().neon;
    default: return false;
  }
}

}  // namespace lofi

LOFI_EXPORT int lofi_abi() { return lofi::kAbi; }

LOFI_EXPORT int lofi_runs(int isa) { return lofi::runs(isa); }
