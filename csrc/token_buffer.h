// Growing array of ids that is not cleared when it grows and can be handed to numpy uncopied.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastgpt {

class TokenBuffer {
 public:
  TokenBuffer() = default;
  TokenBuffer(const TokenBuffer&) = delete;
  TokenBuffer& operator=(const TokenBuffer&) = delete;
  TokenBuffer(TokenBuffer&& other) noexcept
      : data_(other.data_), size_(other.size_), capacity_(other.capacity_) {
    other.data_ = nullptr;
    other.size_ = other.capacity_ = 0;
  }
  ~TokenBuffer() { std::free(data_); }

  const std::uint32_t* data() const { return data_; }
  std::uint32_t* data() { return data_; }
  std::size_t size() const { return size_; }

  // Room for `extra` more ids; fill it and call advance().
  std::uint32_t* room(std::size_t extra) {
    if (capacity_ - size_ < extra) grow(extra);
    return data_ + size_;
  }
  void reserve(std::size_t capacity) {
    if (capacity > capacity_) grow_to(capacity);
  }
  void advance(std::size_t count) { size_ += count; }
  void push(std::uint32_t id) {
    *room(1) = id;
    ++size_;
  }

  // Gives up ownership of the memory, cut down to `bytes`; the caller frees with std::free.
  std::uint32_t* release(std::size_t bytes) {
    void* const cut = bytes ? std::realloc(data_, bytes) : nullptr;
    auto* data = cut ? static_cast<std::uint32_t*>(cut) : data_;
    data_ = nullptr;
    size_ = capacity_ = 0;
    return data;
  }

 private:
  void grow(std::size_t extra) {
    std::size_t wanted = capacity_ + capacity_ / 2 + 64;
    if (wanted < size_ + extra) wanted = size_ + extra;
    grow_to(wanted);
  }

  void grow_to(std::size_t wanted) {
    void* data = std::realloc(data_, wanted * sizeof(std::uint32_t));
    if (!data) throw std::bad_alloc();
    data_ = static_cast<std::uint32_t*>(data);
    capacity_ = wanted;
  }

  std::uint32_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace fastgpt
