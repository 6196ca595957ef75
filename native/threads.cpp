#include "threads.h"

#include <exception>
#include <thread>
#include <vector>

#include "abi.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace lofi {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
using OmpNumber = int (*)();

struct OpenMp {
  GompParallel parallel = nullptr;
  OmpNumber thread = nullptr, threads = nullptr;

  bool found() const { return parallel && thread && threads; }
};

const OpenMp& openmp() {
  static const OpenMp runtime = [] {
    OpenMp it;
#if !defined(_WIN32)
    it.parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    it.thread = reinterpret_cast<OmpNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    it.threads = reinterpret_cast<OmpNumber>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
    return it;
  }();
  return runtime;
}

struct Team {
  void (*part)(void*, int, int);
  void* data;
};

// What each thread of the OpenMP team runs; inside another parallel region the team may be this one thread.
void in_team(void* given) {
  const Team& team = *static_cast<const Team*>(given);
  const OpenMp& omp = openmp();
  team.part(team.data, omp.thread(), omp.threads());
}

void run_started(int threads, const Team& team) {
  std::vector<std::thread> started;
  int next = 1;
  try {
    started.reserve(threads - 1);
    for (; next < threads; ++next) started.emplace_back(team.part, team.data, next, threads);
  } catch (const std::exception&) {  // no more threads to be had: the caller does the rest
  }
  for (int t = next; t < threads; ++t) team.part(team.data, t, threads);
  team.part(team.data, 0, threads);
  for (std::thread& one : started) one.join();
}

}  // namespace

void run_team(int threads, void (*part)(void*, int, int), void* data) {
  Team team{part, data};
  if (threads <= 1) {
    part(data, 0, 1);
  } else if (openmp().found()) {
    openmp().parallel(in_team, &team, static_cast<unsigned>(threads), 0);
  } else {
    run_started(threads, team);
  }
}

}  // namespace lofi

// For tests and `lofi doctor`: whether the threads are torch's.
LOFI_EXPORT int lofi_shares_threads() { return lofi::openmp().found(); }
