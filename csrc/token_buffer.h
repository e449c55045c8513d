// Growing array of ids whose new memory is not cleared.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace fastgpt {

class TokenBuffer {
 public:
  TokenBuffer() = default;
  TokenBuffer(const TokenBuffer&) = delete;
  TokenBuffer& operator=(const TokenBuffer&) = delete;
  ~TokenBuffer() { std::free(data_); }

  const std::uint32_t* data() const { return data_; }
  std::uint32_t* data() { return data_; }
  std::size_t size() const { return size_; }
  std::size_t capacity() const { return capacity_; }
  void clear() { size_ = 0; }
  void swap(TokenBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  // Room for `extra` more ids; fill it and call advance().
  std::uint32_t* room(std::size_t extra) {
    if (capacity_ - size_ < extra) grow(extra);
    return data_ + size_;
  }
  void advance(std::size_t count) { size_ += count; }
  // The same, up to a place in the room.
  void advance_to(const std::uint32_t* end) { size_ = static_cast<std::size_t>(end - data_); }
  void append(const std::uint32_t* ids, std::size_t count) {
    std::memcpy(room(count), ids, count * sizeof *ids);
    size_ += count;
  }
  void push(std::uint32_t id) {
    *room(1) = id;
    ++size_;
  }

 private:
  void grow(std::size_t extra) {
    const std::size_t wanted = std::max(capacity_ + capacity_ / 2 + 64, size_ + extra);
    void* const data = std::realloc(data_, wanted * sizeof(std::uint32_t));
    if (!data) throw std::bad_alloc();
    data_ = static_cast<std::uint32_t*>(data);
    capacity_ = wanted;
  }

  std::uint32_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace fastgpt
