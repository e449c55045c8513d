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

// Which half of a cased word of o200k a character may stand in: [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] or
// [\p{Ll}\p{Lm}\p{Lo}\p{M}]. Marks are in both and of class kOther.
inline constexpr std::uint8_t kUpper = 1;
inline constexpr std::uint8_t kLower = 2;

struct CasedInfo {
  CharClass cls;
  std::uint8_t cases;  // kUpper | kLower
  std::uint8_t length;
};

// Two-stage table over all code points; blocks of 256 equal to an earlier one are shared.
struct CharTables {
  static constexpr std::uint32_t kBlocks = 0x110000 / 256;
  CharClass byte[256];  // first bytes of longer characters count as kOther here
  std::uint8_t block[kBlocks];
  std::uint8_t packed[256][256];  // CharClass | cases << 3
};

extern const CharTables kCharTables;

inline bool is_continuation(std::uint8_t byte) { return (byte & 0xC0) == 0x80; }

inline CasedInfo look_up(std::uint32_t cp, std::uint8_t length) {
  const std::uint8_t packed = kCharTables.packed[kCharTables.block[cp >> 8]][cp & 0xFF];
  return {static_cast<CharClass>(packed & 7), static_cast<std::uint8_t>(packed >> 3), length};
}

// Class, cases and length of a character that starts with a byte >= 0x80. Needs p < end.
inline CasedInfo classify_cased_multibyte(const std::uint8_t* p, const std::uint8_t* end) {
  constexpr CasedInfo kInvalid{CharClass::kOther, 0, 1};
  const std::uint32_t lead = p[0];
  const auto left = end - p;
  if (lead < 0xC2) return kInvalid;  // a continuation byte, or an overlong form
  if (lead < 0xE0) {
    if (left < 2 || !is_continuation(p[1])) return kInvalid;
    return look_up((lead & 0x1F) << 6 | (p[1] & 0x3Fu), 2);
  }
  if (lead < 0xF0) {
    if (left < 3 || !is_continuation(p[1]) || !is_continuation(p[2])) return kInvalid;
    const std::uint32_t cp = (lead & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    if (cp < 0x800 || (cp >= 0xD800 && cp < 0xE000)) return kInvalid;
    return look_up(cp, 3);
  }
  if (left < 4 || !is_continuation(p[1]) || !is_continuation(p[2]) || !is_continuation(p[3])) {
    return kInvalid;
  }
  const std::uint32_t cp =
      (lead & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
  if (lead > 0xF4 || cp < 0x10000 || cp > 0x10FFFF) return kInvalid;
  return look_up(cp, 4);
}

inline CharInfo classify_multibyte(const std::uint8_t* p, const std::uint8_t* end) {
  const CasedInfo info = classify_cased_multibyte(p, end);
  return {info.cls, info.length};
}

// All about the character at p. Needs p < end.
inline CasedInfo classify_cased(const std::uint8_t* p, const std::uint8_t* end) {
  return *p < 0x80 ? look_up(*p, 1) : classify_cased_multibyte(p, end);
}

// Class and length of the character at p. Needs p < end.
inline CharInfo classify(const std::uint8_t* p, const std::uint8_t* end) {
  if (*p < 0x80) return {kCharTables.byte[*p], 1};
  return classify_multibyte(p, end);
}

}  // namespace fastgpt
