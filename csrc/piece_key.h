// The bytes of a short piece of text in two words, as the tables hash and compare them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastgpt {

static_assert(sizeof(void*) == 8, "fastgpt needs a 64-bit machine");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastgpt packs bytes into words as a little-endian machine does"
#endif

// The bits of the first 0 to 16 bytes in two words; of the 16th byte none.
struct PrefixMasks {
  std::uint64_t low[17];
  std::uint64_t high[17];

  constexpr PrefixMasks() : low{}, high{} {
    for (int i = 0; i <= 16; ++i) {
      low[i] = i < 8 ? (std::uint64_t{1} << 8 * i) - 1 : ~std::uint64_t{0};
      high[i] = i <= 8 ? 0 : (std::uint64_t{1} << 8 * ((i < 15 ? i : 15) - 8)) - 1;
    }
  }
};
inline constexpr PrefixMasks kPrefixMasks{};

// The bytes, zero-padded, with their number in the last one. Of a longer piece that one is 16,
// which no piece that fits has.
struct PieceKey {
  static constexpr std::size_t kMaxLength = 15;
  static constexpr int kLengthShift = 56;

  std::uint64_t low;
  std::uint64_t high;

  // Reads 16 bytes where the text has them, never past its end.
  static PieceKey of(const std::uint8_t* p, std::size_t length, const std::uint8_t* end) {
    const std::size_t used = length <= kMaxLength ? length : kMaxLength + 1;
    std::uint64_t word[2];
    if (end - p >= 16) {
      std::memcpy(word, p, 16);
    } else {
      word[0] = word[1] = 0;
      std::memcpy(word, p, used);
    }
    return {word[0] & kPrefixMasks.low[used],
            (word[1] & kPrefixMasks.high[used]) | static_cast<std::uint64_t>(used) << kLengthShift};
  }

  const std::uint8_t* bytes() const { return reinterpret_cast<const std::uint8_t*>(this); }
  std::size_t length() const { return static_cast<std::size_t>(high >> kLengthShift); }
};

}  // namespace fastgpt
