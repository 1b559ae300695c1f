// How the threads of a parallel region share work, and wait for each other.
//
// OpenMP's loops wait for every thread, also for one that has nothing left to do and only lost its
// core to another process: a server's ranks have such neighbours. Here a thread takes over what
// another has not begun, and goes on once the work is done, whoever is there.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace {

class Crew {
 public:
  // To be made before the parallel region, for all its threads.
  Crew() : threads(omp_get_max_threads()), begun(new Counter[threads]) {}

 private:
  friend class Member;
  struct alignas(64) Counter { std::atomic<int64_t> value{0}; };
  const int64_t threads;
  std::unique_ptr<Counter[]> begun;  // chunks of each thread's own parts that were begun, all in all
  Counter done;                      // chunks that were finished, all in all
};

// One thread of a crew. All of a region's threads call the same `share`s in the same order.
class Member {
 public:
  explicit Member(Crew& crew) : crew(crew), me(omp_get_thread_num()), before(crew.threads) {}

  // work(first, last) for parts of 0 ... count, `chunk` at most; returns when all of them are done.
  template <class Work>
  void share(int64_t count, int64_t chunk, Work work) {
    const int64_t chunks = (count + chunk - 1) / chunk, threads = crew.threads;
    for (int64_t i = 0; i < threads; ++i) {
      // Neighbouring chunks stay with one thread, whose memory stream they are; then it helps out.
      const int64_t owner = (me + i) % threads;
      const int64_t first = chunks * owner / threads, own = chunks * (owner + 1) / threads - first;
      int64_t finished = 0;
      for (int64_t at; (at = begin(owner, before[owner] + own)) >= 0; ++finished) {
        const int64_t start = (first + at - before[owner]) * chunk;
        work(start, std::min(count, start + chunk));
      }
      if (finished) crew.done.value.fetch_add(finished, std::memory_order_acq_rel);
      before[owner] += own;
    }
    total += chunks;
    for (int64_t looked = 0; crew.done.value.load(std::memory_order_acquire) < total; ++looked)
      if (looked < SPINS) pause(); else sched_yield();
  }

 private:
  static constexpr int64_t SPINS = 2000;
  Crew& crew;
  const int64_t me;
  std::vector<int64_t> before;  // per thread: chunks of earlier shares
  int64_t total = 0;            // chunks up to now

  // The next chunk of a thread's part, or -1 if all up to `limit` were begun.
  int64_t begin(int64_t owner, int64_t limit) {
    auto& begun = crew.begun[owner].value;
    for (int64_t at = begun.load(std::memory_order_relaxed); at < limit;)
      if (begun.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel)) return at;
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

// `work(member)` in every thread.
template <class Work>
void together(Work work) {
  Crew crew;
#pragma omp parallel
  {
    Member member(crew);
    work(member);
  }
}

}  // namespace
