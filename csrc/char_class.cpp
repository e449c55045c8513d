#include "char_class.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "unicode_ranges.h"

namespace fastgpt {
namespace {

CharTables build_tables() {
  std::vector<CharClass> flat(0x110000, CharClass::kOther);
  for (const CodePointRange& range : kUnicodeRanges) {
    for (std::uint32_t cp = range.first; cp <= range.last; ++cp) flat[cp] = range.cls;
  }
  CharTables tables{};
  std::memcpy(tables.byte, flat.data(), 128);
  std::uint32_t used = 0;
  for (std::uint32_t b = 0; b < CharTables::kBlocks; ++b) {
    const CharClass* source = flat.data() + b * 256;
    std::uint32_t same = 0;
    while (same < used && std::memcmp(tables.cls[same], source, 256) != 0) ++same;
    if (same == 256) throw std::logic_error("unicode tables need more than 256 distinct blocks");
    if (same == used) std::memcpy(tables.cls[used++], source, 256);
    tables.block[b] = static_cast<std::uint8_t>(same);
  }
  return tables;
}

inline bool is_continuation(std::uint8_t byte) { return (byte & 0xC0) == 0x80; }

inline CharClass class_of(std::uint32_t cp) {
  return kCharTables.cls[kCharTables.block[cp >> 8]][cp & 0xFF];
}

constexpr CharInfo kInvalid{CharClass::kOther, 1};

}  // namespace

const CharTables kCharTables = build_tables();

CharInfo classify_multibyte(const std::uint8_t* p, const std::uint8_t* end) {
  const std::uint32_t lead = p[0];
  const auto left = end - p;
  if (lead < 0xC2) return kInvalid;  // a continuation byte, or an overlong form
  if (lead < 0xE0) {
    if (left < 2 || !is_continuation(p[1])) return kInvalid;
    return {class_of((lead & 0x1F) << 6 | (p[1] & 0x3Fu)), 2};
  }
  if (lead < 0xF0) {
    if (left < 3 || !is_continuation(p[1]) || !is_continuation(p[2])) return kInvalid;
    const std::uint32_t cp = (lead & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    if (cp < 0x800 || (cp >= 0xD800 && cp < 0xE000)) return kInvalid;
    return {class_of(cp), 3};
  }
  if (left < 4 || !is_continuation(p[1]) || !is_continuation(p[2]) || !is_continuation(p[3])) {
    return kInvalid;
  }
  const std::uint32_t cp =
      (lead & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
  if (lead > 0xF4 || cp < 0x10000 || cp > 0x10FFFF) return kInvalid;
  return {class_of(cp), 4};
}

}  // namespace fastgpt
