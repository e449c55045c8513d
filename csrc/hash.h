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

// The piece [p, p + length) of at most kWords * 8 - 1 bytes as whole words, zero-padded, with the
// length in the last byte. Reads past the piece where the text goes on, never past end.
template <int kWords>
inline void pack_bytes(const std::uint8_t* p, std::size_t length, const std::uint8_t* end,
                       std::uint64_t (&out)[kWords]) {
  if (end - p >= kWords * 8) {
    std::memcpy(out, p, sizeof out);
    for (int i = 0; i < kWords; ++i) {
      const std::size_t begin = static_cast<std::size_t>(i) * 8;
      if (length <= begin) {
        out[i] = 0;
      } else if (length < begin + 8) {
        out[i] &= ~0ull >> (64 - 8 * (length - begin));
      }
    }
  } else {
    std::memset(out, 0, sizeof out);
    std::memcpy(out, p, length);
  }
  out[kWords - 1] |= static_cast<std::uint64_t>(length) << 56;
}

static_assert(sizeof(void*) == 8, "fastgpt needs a 64-bit machine");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastgpt packs bytes into words as a little-endian machine does"
#endif

}  // namespace fastgpt
