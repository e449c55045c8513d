// Pair of adjacent ids -> rank of its merge, in one flat table of 8-byte slots.
#pragma once

#include <cstdint>
#include <vector>

namespace fastgpt {

struct Merge {
  std::uint32_t left;
  std::uint32_t right;
  std::uint32_t id;  // what the pair becomes
};

class MergeTable {
 public:
  static constexpr std::uint32_t kNone = 0xFFFFFF;   // rank of a pair that does not merge
  static constexpr std::uint32_t kMaxIds = 0xFFFFF;  // ids must be below
  static constexpr std::uint32_t kMaxMerges = kNone - 1;

  // The rank of a merge is its place in the list; of a pair listed twice the last one counts, as
  // in Hugging Face tokenizers. Ids must be below kMaxIds and the list not over kMaxMerges.
  explicit MergeTable(const std::vector<Merge>& merges);

  std::uint32_t rank(std::uint32_t left, std::uint32_t right) const {
    const std::uint64_t key = static_cast<std::uint64_t>(left) << 20 | right;
    for (std::size_t i = slot_of(key);; i = (i + 1) & mask_) {
      const std::uint64_t slot = slots_[i];
      if (slot >> 24 == key) return static_cast<std::uint32_t>(slot & kNone);
      if (slot == kEmpty) return kNone;
    }
  }

  std::uint32_t id(std::uint32_t rank) const { return ids_[rank]; }

 private:
  static constexpr std::uint64_t kEmpty = ~0ull;

  std::size_t slot_of(std::uint64_t key) const {
    return static_cast<std::size_t>(((key ^ key >> 23) * 0x9E3779B97F4A7C15ull) >> shift_);
  }

  std::vector<std::uint64_t> slots_;  // left:20 | right:20 | rank:24
  std::vector<std::uint32_t> ids_;    // by rank
  std::size_t mask_ = 0;
  int shift_ = 0;
};

}  // namespace fastgpt
