// Bounded cache from longer pieces of text, and those of many ids, to their ids.
//
// Such pieces are of all sizes, so they lie one behind the other, and a table holds their places.
// Both grow up to a fixed size; then all is forgotten. Keys are compared whole.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hash.h"
#include "piece_key.h"
#include "zeroed_memory.h"

namespace fastgpt {

class LongCache {
 public:
  static constexpr std::size_t kMaxLength = 31;  // bytes of a piece that is found by itself

  struct Ids {
    const std::uint32_t* data;  // until the next insertion; nullptr: not here
    std::size_t count;
  };

  // Where ids lie, for those who remember that themselves.
  struct Place {
    std::uint32_t word;
    std::uint32_t generation;
  };

  LongCache() : slots_(std::size_t{1} << kFirstBits), memory_(kMostWords * sizeof(std::uint32_t)) {
    records_ = static_cast<std::uint32_t*>(memory_.data());
  }

  // Of a piece of 16 to kMaxLength bytes. Reads no further than end.
  static std::uint32_t hash(const std::uint8_t* p, std::size_t length, const std::uint8_t* end) {
    std::uint64_t word[4] = {};
    if (end - p >= 32) {
      std::memcpy(word, p, 32);
    } else {
      std::memcpy(word, p, length);
    }
    word[2] &= kPrefixMasks.low[length - 16];
    word[3] &= kPrefixMasks.high[length - 16];
    const std::uint64_t front = word[0] * 0x9E3779B97F4A7C15ull ^ word[1] * 0xD6E8FEB86659FD93ull;
    const std::uint64_t back = word[2] * 0xA0761D6478BD642Full ^ word[3] * 0xE7037ED1A0B428DBull;
    return static_cast<std::uint32_t>(mix(front ^ front >> 32, back ^ back >> 32) >> 32);
  }

  // The memory where find() begins to look starts to be fetched.
  void prefetch(std::uint32_t hash) const {
#if defined(__GNUC__)
    __builtin_prefetch(&slots_[hash & mask()]);
#else
    (void)hash;
#endif
  }

  Ids find(const std::uint8_t* p, std::size_t length, std::uint32_t hash) const {
    for (std::size_t step = 0; step < kSteps; ++step) {
      const Slot& slot = slots_[(hash + step) & mask()];
      if (slot.word == 0) break;
      if (slot.hash != hash) continue;
      const std::uint32_t* const record = records_ + slot.word;
      const Ids ids = ids_of(record);
      if ((record[0] & kLengthMask) == length &&
          std::memcmp(ids.data + ids.count, p, length) == 0) {
        return ids;
      }
    }
    return {nullptr, 0};
  }

  Ids at(Place place) const {
    if (place.generation != generation_) return {nullptr, 0};
    return ids_of(records_ + place.word);
  }

  // Needs a piece that is not here.
  void insert(const std::uint8_t* p, std::size_t length, std::uint32_t hash,
              const std::uint32_t* ids, std::size_t count) {
    if (used_ * 2 >= slots_.size()) slots_.size() < kMostSlots ? grow() : clear();
    put({hash, add(p, length, ids, count).word});
    ++used_;
  }

  // Ids that only at() will find.
  Place insert(const std::uint32_t* ids, std::size_t count) { return add(nullptr, 0, ids, count); }

 private:
  static constexpr int kFirstBits = 10;                            // 2^bits slots
  static constexpr std::size_t kMostSlots = std::size_t{1} << 20;  // 8 MB
  static constexpr std::size_t kMostWords = std::size_t{1} << 22;  // 16 MB
  static constexpr std::size_t kSteps = 8;  // slots that a piece may have, else an old one is lost
  static constexpr int kCountShift = 8;
  static constexpr std::uint32_t kLengthMask = 0xFF;

  struct Slot {
    std::uint32_t hash = 0;
    std::uint32_t word = 0;  // of the record; 0: free
  };

  std::size_t mask() const { return slots_.size() - 1; }

  static Ids ids_of(const std::uint32_t* record) { return {record + 1, record[0] >> kCountShift}; }

  Place add(const std::uint8_t* p, std::size_t length, const std::uint32_t* ids,
            std::size_t count) {
    const std::size_t words = 1 + count + (length + 3) / 4;
    if (size_ + words > kMostWords) clear();
    const auto place = static_cast<std::uint32_t>(size_);
    std::uint32_t* const record = records_ + place;
    record[0] = static_cast<std::uint32_t>(count << kCountShift | length);
    std::memcpy(record + 1, ids, count * sizeof *ids);
    if (length) std::memcpy(record + 1 + count, p, length);
    size_ += words;
    return {place, generation_};
  }

  void put(Slot slot) {
    std::size_t step = 0;
    while (step < kSteps && slots_[(slot.hash + step) & mask()].word) ++step;
    slots_[(slot.hash + step % kSteps) & mask()] = slot;
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 4);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.word) put(slot);
    }
  }

  void clear() {
    std::fill(slots_.begin(), slots_.end(), Slot());
    size_ = 1;
    used_ = 0;
    ++generation_;
  }

  std::vector<Slot> slots_;
  ZeroedMemory memory_;
  std::uint32_t* records_;  // each: length and number of ids; the ids; the bytes
  std::size_t size_ = 1;    // words of the records, and one before them
  std::size_t used_ = 0;
  std::uint32_t generation_ = 0;
};

}  // namespace fastgpt
