// Hashing of byte strings for the tables of this library (not stable across versions).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastgpt {

inline std::uint64_t mix(std::uint64_t hash, std::uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
  return hash ^ hash >> 29;
}

inline std::uint64_t hash_bytes(const std::uint8_t* p, std::size_t length) {
  std::uint64_t hash = length;
  for (; length >= 8; p += 8, length -= 8) {
    std::uint64_t word;
    std::memcpy(&word, p, 8);
    hash = mix(hash, word);
  }
  std::uint64_t word = 0;
  if (length) std::memcpy(&word, p, length);
  return mix(mix(hash, word), 0x2545F4914F6CDD1Dull);
}

}  // namespace fastgpt
