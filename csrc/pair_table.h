// The pairs that training may merge next: how often each occurs, and where.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hash.h"

namespace fastgpt {

inline std::uint64_t pair_key(std::uint32_t left, std::uint32_t right) {
  return static_cast<std::uint64_t>(left) << 32 | right;
}

// Open-addressing map from pairs to places in an array of PairInfo.
struct PairInfo {
  std::uint64_t key;
  std::uint64_t count;  // exact, weighted by the counts of the words
  // Ascending places where the pair occurs or once occurred; to be checked against the text.
  std::unique_ptr<std::uint32_t[]> places;
  std::uint32_t places_size;
};

class PairTable {
 public:
  PairTable() : slots_(4096, 0) {}

  PairInfo* find(std::uint64_t key) {
    const std::uint64_t hash = mix(mix(0, key), 0);
    for (std::size_t i = hash & mask();; i = (i + 1) & mask()) {
      if (slots_[i] == 0) return nullptr;
      if ((slots_[i] ^ hash) >> 32 == 0) {
        PairInfo& info = infos_[static_cast<std::uint32_t>(slots_[i]) - 1];
        if (info.key == key) return &info;
      }
    }
  }

  // Adds a pair that is not in the table. The reference holds until the next insertion.
  PairInfo& insert(std::uint64_t key, std::uint64_t count) {
    if ((infos_.size() + 1) * 3 >= slots_.size() * 2) grow();
    infos_.push_back({key, count, nullptr, 0});
    place(infos_.size());
    return infos_.back();
  }

  void clear() {
    infos_.clear();
    std::vector<std::uint64_t>(4096, 0).swap(slots_);
  }

  std::vector<PairInfo>& infos() { return infos_; }

 private:
  std::size_t mask() const { return slots_.size() - 1; }

  void place(std::size_t number) {
    const std::uint64_t hash = mix(mix(0, infos_[number - 1].key), 0);
    std::size_t i = hash & mask();
    while (slots_[i]) i = (i + 1) & mask();
    slots_[i] = (hash & 0xFFFFFFFF00000000ull) | number;
  }

  void grow() {
    std::vector<std::uint64_t>(slots_.size() * 2, 0).swap(slots_);
    for (std::size_t number = 1; number <= infos_.size(); ++number) place(number);
  }

  std::vector<std::uint64_t> slots_;  // hash of the key:32 | place in infos_ plus one:32
  std::vector<PairInfo> infos_;
};

}  // namespace fastgpt
