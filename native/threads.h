// Work over ranges in several threads. Knows no kernel.
//
// The threads are torch's own: its OpenMP runtime is found at run time by name (GOMP_parallel, which libgomp, libomp and
// libiomp5 all export), so no second pool of spinning threads fights torch's, and nothing is linked. Where the process
// has no such runtime, threads are started for the call and joined; where none can be started, the caller does it all.
// Rejected: linking OpenMP (a second runtime beside the one that torch ships), a pool of our own (the same, spinning).
#pragma once

#include <algorithm>
#include <cstdint>

namespace lofi {

// Calls part(data, t, n) for t = 0..n-1 in up to `threads` threads, n <= threads being how many really take part.
// Every t of 0..n-1 is called exactly once; returns after the last. `part` must not throw.
void run_team(int threads, void (*part)(void* data, int t, int n), void* data);

// Calls body(first, last) on disjoint ranges that cover 0..count, every `first` a multiple of `grain`, at most one range
// a thread. Ranges are as equal as the grain allows. In the caller's own thread where one range is enough.
// `static`: each file that uses it has its own copy (see cpu.h).
template <class Body>
static void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  const int team = static_cast<int>(std::min<int64_t>(threads, pieces));
  if (team <= 1) {
    body(int64_t{0}, count);
    return;
  }
  struct Work {
    const Body* body;
    int64_t count, grain, pieces;
    static void part(void* data, int t, int n) {
      const Work& work = *static_cast<const Work*>(data);
      const int64_t first = work.pieces * t / n * work.grain;
      const int64_t last = work.pieces * (t + 1) / n * work.grain;
      if (first < last) (*work.body)(first, last < work.count ? last : work.count);
    }
  } work{&body, count, grain, pieces};
  run_team(team, &Work::part, &work);
}

}  // namespace lofi
