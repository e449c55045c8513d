// Growing array of ids as numpy will have them: in 2 bytes each where all of a vocabulary fit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace fastgpt {

// Writes ids in 2 bytes (narrow) or 4.
inline void write_ids(void* out, bool narrow, const std::uint32_t* ids, std::size_t count) {
  if (!narrow) {
    if (count) std::memcpy(out, ids, count * sizeof *ids);
    return;
  }
  auto* const small = static_cast<std::uint16_t*>(out);
  for (std::size_t i = 0; i < count; ++i) small[i] = static_cast<std::uint16_t>(ids[i]);
}

class IdArray {
 public:
  explicit IdArray(bool narrow) : narrow_(narrow) {}
  IdArray(const IdArray&) = delete;
  IdArray& operator=(const IdArray&) = delete;
  IdArray(IdArray&& other) noexcept
      : narrow_(other.narrow_), data_(other.data_), size_(other.size_), capacity_(other.capacity_) {
    other.data_ = nullptr;
    other.size_ = other.capacity_ = 0;
  }
  ~IdArray() { std::free(data_); }

  std::size_t size() const { return size_; }
  std::size_t id_bytes() const { return narrow_ ? 2 : 4; }
  const char* at(std::size_t i) const { return data_ + i * id_bytes(); }
  void clear() { size_ = 0; }

  void append(const std::uint32_t* ids, std::size_t count) {
    if (capacity_ - size_ < count) resize(size_ + count + capacity_ / 2);
    write_ids(data_ + size_ * id_bytes(), narrow_, ids, count);
    size_ += count;
  }

  // Gives up ownership of the memory, cut down to its size; the caller frees it with std::free.
  char* release() {
    resize(size_);
    char* const data = data_;
    data_ = nullptr;
    size_ = capacity_ = 0;
    return data;
  }

 private:
  void resize(std::size_t capacity) {
    void* const data = std::realloc(data_, capacity * id_bytes() + 1);  // 0 may give nullptr
    if (!data) throw std::bad_alloc();
    data_ = static_cast<char*>(data);
    capacity_ = capacity;
  }

  bool narrow_;
  char* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace fastgpt
