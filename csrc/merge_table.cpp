#include "merge_table.h"

namespace fastgpt {

MergeTable::MergeTable(const std::vector<Merge>& merges) {
  int bits = 6;
  while ((std::size_t{1} << bits) < merges.size() * 2) ++bits;
  slots_.assign(std::size_t{1} << bits, kEmpty);
  mask_ = slots_.size() - 1;
  shift_ = 64 - bits;
  ids_.reserve(merges.size());
  for (std::uint32_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    const std::uint64_t key = static_cast<std::uint64_t>(merge.left) << 20 | merge.right;
    std::size_t i = slot_of(key);
    while (slots_[i] != kEmpty && slots_[i] >> 24 != key) i = (i + 1) & mask_;
    slots_[i] = key << 24 | rank;
    ids_.push_back(merge.id);
  }
}

}  // namespace fastgpt
