// Character classes that the split patterns distinguish, and their lookup in UTF-8 text.
#pragma once

#include <cstdint>

namespace fastgpt {

enum class CharClass : std::uint8_t {
  kOther = 0,    // [^\s\p{L}\p{N}]; also every byte that is not part of well-formed UTF-8
  kLetter = 1,   // \p{L}
  kNumber = 2,   // \p{N}
  kSpace = 3,    // \s except \r and \n
  kNewline = 4,  // \r and \n
};

struct CharInfo {
  CharClass cls;
  std::uint8_t length;  // bytes, 1 to 4
};

// Two-stage table over all code points; blocks of 256 equal to an earlier one are shared.
struct CharTables {
  static constexpr std::uint32_t kBlocks = 0x110000 / 256;
  CharClass byte[256];  // first bytes of longer characters count as kOther here
  std::uint8_t block[kBlocks];
  CharClass cls[256][256];
};

extern const CharTables kCharTables;

// Class and length of a character that starts with a byte >= 0x80. Needs p < end.
CharInfo classify_multibyte(const std::uint8_t* p, const std::uint8_t* end);

// Class and length of the character at p. Needs p < end.
inline CharInfo classify(const std::uint8_t* p, const std::uint8_t* end) {
  if (*p < 0x80) return {kCharTables.byte[*p], 1};
  return classify_multibyte(p, end);
}

}  // namespace fastgpt
