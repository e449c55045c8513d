// UTF-8 of text that is held in characters of 1 (Latin-1), 2 or 4 bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "token_buffer.h"

namespace fastgpt {

// How many of the next characters are ASCII, of as many as eight bytes hold; they are written to
// out, which has room for eight bytes.
template <class Char>
inline std::size_t copy_ascii(const Char* text, char* out) {
  constexpr std::size_t kCount = 8 / sizeof(Char);
  constexpr std::uint64_t kOthers = sizeof(Char) == 1   ? 0x8080808080808080
                                    : sizeof(Char) == 2 ? 0xFF80FF80FF80FF80
                                                        : 0xFFFFFF80FFFFFF80;
  std::uint64_t word;
  std::memcpy(&word, text, 8);
  if (word & kOthers) return 0;
  if (sizeof(Char) == 2) word = (word | word >> 8) & 0x0000FFFF0000FFFF;
  if (sizeof(Char) >= 2) word |= word >> (sizeof(Char) == 2 ? 16 : 24);
  std::memcpy(out, &word, 8);
  return kCount;
}

// Writes one character and returns where it ends. False in *valid for half of a surrogate pair.
inline char* put_character(std::uint32_t c, char* out, bool* valid) {
  const auto low = [c](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) {
    *out++ = static_cast<char>(c);
  } else if (c < 0x800) {
    *out++ = static_cast<char>(0xC0 | c >> 6);
    *out++ = low(0);
  } else if (c < 0x10000) {
    if (c >= 0xD800 && c < 0xE000) *valid = false;
    *out++ = static_cast<char>(0xE0 | c >> 12);
    *out++ = low(6);
    *out++ = low(0);
  } else {
    *out++ = static_cast<char>(0xF0 | c >> 18);
    *out++ = low(12);
    *out++ = low(6);
    *out++ = low(0);
  }
  return out;
}

// Appends the UTF-8 of the characters. Returns false if there is half a surrogate pair among them,
// which has none.
template <class Char>
bool append_utf8(const Char* text, std::size_t length, ByteBuffer& out) {
  constexpr std::size_t kMost = sizeof(Char) == 4 ? 4 : sizeof(Char) + 1;  // bytes of a character
  constexpr std::size_t kStep = 4096;
  bool valid = true;
  for (std::size_t begin = 0; begin < length && valid; begin += kStep) {
    const Char* p = text + begin;
    const Char* const end = p + std::min(kStep, length - begin);
    char* place = out.room(kStep * kMost + 8);
    while (p < end) {
      while (end - p >= 8) {
        const std::size_t copied = copy_ascii(p, place);
        if (copied == 0) break;
        p += copied;
        place += copied;
      }
      // The last characters, or one of another script and then mostly more of them.
      while (p < end) {
        const std::uint32_t c = *p++;
        place = put_character(c, place, &valid);
        if (c < 0x80 && end - p >= 8) break;
      }
    }
    out.advance_to(place);
  }
  return valid;
}

}  // namespace fastgpt
