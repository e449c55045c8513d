#include "char_class.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "unicode_ranges.h"

namespace fastgpt {
namespace {

CharTables build_tables() {
  std::vector<std::uint8_t> flat;
  for (const std::uint32_t range : kUnicodeRanges) {
    flat.resize((range >> 8) + 1, static_cast<std::uint8_t>(range));
  }
  CharTables tables{};
  for (int i = 0; i < 128; ++i) tables.byte[i] = static_cast<CharClass>(flat[i] & 7);
  std::uint32_t used = 0;
  for (std::uint32_t b = 0; b < CharTables::kBlocks; ++b) {
    const std::uint8_t* source = flat.data() + b * 256;
    std::uint32_t same = 0;
    while (same < used && std::memcmp(tables.packed[same], source, 256) != 0) ++same;
    if (same == 256) throw std::logic_error("unicode tables need more than 256 distinct blocks");
    if (same == used) std::memcpy(tables.packed[used++], source, 256);
    tables.block[b] = static_cast<std::uint8_t>(same);
  }
  return tables;
}

}  // namespace

const CharTables kCharTables = build_tables();

}  // namespace fastgpt
