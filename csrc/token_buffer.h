// Growing array whose new memory is not cleared.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace fastgpt {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  const T* data() const { return data_; }
  T* data() { return data_; }
  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }
  void clear() { size_ = 0; }
  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  // Room for `extra` more; fill it and call advance().
  T* room(std::size_t extra) {
    if (capacity_ - size_ < extra) grow(extra);
    return data_ + size_;
  }
  void advance(std::size_t count) { size_ += count; }
  // The same, up to a place in the room.
  void advance_to(const T* end) { size_ = static_cast<std::size_t>(end - data_); }
  void append(const T* items, std::size_t count) {
    if (count) std::memcpy(room(count), items, count * sizeof *items);
    size_ += count;
  }
  void push(T item) {
    *room(1) = item;
    ++size_;
  }

 private:
  void grow(std::size_t extra) {
    const std::size_t wanted = std::max(capacity_ + capacity_ / 2 + 64, size_ + extra);
    void* const data = std::realloc(data_, wanted * sizeof(T));
    if (!data) throw std::bad_alloc();
    data_ = static_cast<T*>(data);
    capacity_ = wanted;
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

using TokenBuffer = Buffer<std::uint32_t>;
using ByteBuffer = Buffer<char>;

}  // namespace fastgpt
