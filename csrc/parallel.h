// Memory and threads of the CPU's passes over matrices.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace synpo {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t size) {
  void* p = std::aligned_alloc(64, round_up(std::max<int64_t>(size, 1) * sizeof(T), 64));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

// Tasks for one thread to begin with; whoever is done takes from the others', for cores are seldom equally free.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

template <class F>
void parallel(int64_t tasks, const F& task) {
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = t * tasks / threads;
    shares[t].end = (t + 1) * tasks / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t k = 0; k < threads; ++k) {
      Share& share = shares[(begin + k) % threads];
      for (int64_t i = share.next++; i < share.end; i = share.next++) task(i);
    }
  });
}

}  // namespace synpo
