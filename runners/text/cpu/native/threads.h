// Work sharing among the threads of an OpenMP parallel region.
//
// At the end of an OpenMP loop every thread waits for all others, including one that has no work
// left but lost its core to another process, as happens on a server. Here a thread takes over work
// that another has not started, and continues as soon as all work is finished.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace {

// What the threads of one parallel region share. It is created before the region.
class ThreadTeam {
 public:
  ThreadTeam() : size(omp_get_max_threads()), started(new Counter[size]) {}

 private:
  friend class TeamThread;
  struct alignas(64) Counter { std::atomic<int64_t> value{0}; };
  const int64_t size;
  std::unique_ptr<Counter[]> started;  // per thread: started chunks of its share, over all loops
  Counter finished;                    // finished chunks of all threads, over all loops
};

// One thread of a team. All threads of the region run the same loops in the same order.
class TeamThread {
 public:
  explicit TeamThread(ThreadTeam& team) : team(team), index(omp_get_thread_num()), offsets(team.size) {}

  // Runs body(first, last) over subranges of 0 ... count of at most `chunk` elements. Returns when
  // all of them are finished.
  template <class Body>
  void parallel_for(int64_t count, int64_t chunk, Body body) {
    const int64_t chunks = (count + chunk - 1) / chunk;
    for (int64_t i = 0; i < team.size; ++i) {
      // A thread reads adjacent chunks, which prefetches well, before it takes over those of others.
      const int64_t owner = (index + i) % team.size;
      const int64_t first = chunks * owner / team.size;
      const int64_t share = chunks * (owner + 1) / team.size - first;
      int64_t completed = 0;
      for (int64_t next; (next = start(owner, offsets[owner] + share)) >= 0; ++completed) {
        const int64_t begin = (first + next - offsets[owner]) * chunk;
        body(begin, std::min(count, begin + chunk));
      }
      if (completed) team.finished.value.fetch_add(completed, std::memory_order_acq_rel);
      offsets[owner] += share;
    }
    total += chunks;
    for (int64_t polls = 0; team.finished.value.load(std::memory_order_acquire) < total; ++polls)
      if (polls < SPINS) pause(); else sched_yield();
  }

 private:
  static constexpr int64_t SPINS = 2000;
  ThreadTeam& team;
  const int64_t index;
  std::vector<int64_t> offsets;  // per thread: chunks of its shares in earlier loops
  int64_t total = 0;             // chunks of all loops so far

  // Claims the next chunk of a thread's share; -1 if all chunks below `limit` have been started.
  int64_t start(int64_t owner, int64_t limit) {
    auto& counter = team.started[owner].value;
    for (int64_t next = counter.load(std::memory_order_relaxed); next < limit;)
      if (counter.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) return next;
    return -1;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

// Runs body(thread) in every thread of a new team.
template <class Body>
void parallel_region(Body body) {
  ThreadTeam team;
#pragma omp parallel
  {
    TeamThread thread(team);
    body(thread);
  }
}

}  // namespace
