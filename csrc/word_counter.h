// Counts of the distinct pieces of a text stream: all that training needs to remember of it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "piece_key.h"
#include "pretokenizer.h"

namespace fastgpt {

// Open-addressing map from words to 64-bit counts.
class WordMap {
 public:
  WordMap();
  void add(const std::uint8_t* word, std::size_t length, const std::uint8_t* end,
           std::uint64_t count);
  std::size_t size() const { return short_used_ + long_used_; }

  // Calls f(const uint8_t* word, size_t length, uint64_t count) for each word, in no fixed order.
  template <class F>
  void for_each(F&& f) const {
    for (const ShortSlot& slot : short_) {
      if (slot.count) f(slot.key.bytes(), slot.key.length(), slot.count);
    }
    for (const LongSlot& slot : long_) {
      if (slot.count) f(arena_.data() + slot.offset, std::size_t{slot.length}, slot.count);
    }
  }

 private:
  struct ShortSlot {
    PieceKey key;
    std::uint64_t count;  // 0 is a free slot
  };
  struct LongSlot {
    std::uint64_t hash;
    std::uint64_t offset;  // in arena_
    std::uint64_t length;
    std::uint64_t count;  // 0 is a free slot
  };

  void add_long(const std::uint8_t* word, std::size_t length, std::uint64_t count);
  void grow_short();
  void grow_long();

  std::vector<ShortSlot> short_;
  std::vector<LongSlot> long_;
  std::vector<std::uint8_t> arena_;
  std::size_t short_used_ = 0;
  std::size_t long_used_ = 0;
};

class WordCounter {
 public:
  // threads: 0 is one per core. Results do not depend on it.
  WordCounter(Pattern pattern, int threads);

  // Counts the pieces of each text. Texts are shared out among the threads.
  void add(const std::vector<std::string_view>& texts);

  // Counts the pieces of one text that end at the `count` rising places `ends`. Throws
  // std::invalid_argument for other places.
  void add_pieces(std::string_view text, const std::int64_t* ends, std::size_t count);

  // All counts in one map; the counter is empty afterwards.
  WordMap take();

 private:
  Pattern pattern_;
  std::vector<WordMap> maps_;  // one per thread
};

}  // namespace fastgpt
