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

}  // namespace

const CharTables kCharTables = build_tables();

}  // namespace fastgpt
