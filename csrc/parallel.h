// A loop over threads that live no longer than the call, so that a fork later finds none.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastgpt {

// threads, or one per core if it is 0 or less; at least 1.
inline int resolve_threads(int threads) {
  if (threads > 0) return std::min(threads, 1024);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls f(i, thread) for i in [0, count); whichever thread is free takes the next i. The first
// exception ends the loop and is thrown here.
template <class F>
void parallel_for(std::size_t count, int threads, F&& f) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&](int thread) {
    try {
      for (std::size_t i = next++; i < count; i = next++) f(i, thread);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  const auto wanted = std::min(count, static_cast<std::size_t>(std::max(threads, 1)));
  try {
    for (std::size_t thread = 1; thread < wanted; ++thread) {
      helpers.emplace_back(work, static_cast<int>(thread));
    }
  } catch (const std::system_error&) {
    // No more threads to be had: the ones there are do the work.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace fastgpt
