// Zeroed memory for large tables that are accessed at random.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgpt {

class ZeroedMemory {
 public:
  explicit ZeroedMemory(std::size_t bytes) : bytes_(bytes) {
#if defined(__linux__)
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    // Before the first touch: huge pages save most misses of the address cache. Only advice.
    madvise(data_, bytes, MADV_HUGEPAGE);
#else
    data_ = std::calloc(bytes, 1);
    if (!data_) throw std::bad_alloc();
#endif
  }
  ZeroedMemory(const ZeroedMemory&) = delete;
  ZeroedMemory& operator=(const ZeroedMemory&) = delete;
  ~ZeroedMemory() {
#if defined(__linux__)
    munmap(data_, bytes_);
#else
    std::free(data_);
#endif
  }

  void* data() const { return data_; }
  void swap(ZeroedMemory& other) {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
  }

 private:
  std::size_t bytes_;
  void* data_;
};

}  // namespace fastgpt
