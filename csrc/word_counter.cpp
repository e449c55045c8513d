#include "word_counter.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "hash.h"
#include "parallel.h"
#include "piece_finder.h"

namespace fastgpt {
namespace {

inline std::size_t hash_short(const PieceKey& key) {
  return static_cast<std::size_t>(mix(mix(mix(0, key.low), key.high), 0));
}

// Slots are at most two thirds full.
inline bool is_full(std::size_t used, std::size_t slots) { return used * 3 >= slots * 2; }

}  // namespace

WordMap::WordMap() : short_(1024), long_(256) {}

void WordMap::add(const std::uint8_t* word, std::size_t length, const std::uint8_t* end,
                  std::uint64_t count) {
  if (length > PieceKey::kMaxLength) return add_long(word, length, count);
  const PieceKey key = PieceKey::of(word, length, end);
  const std::size_t mask = short_.size() - 1;
  std::size_t i = hash_short(key) & mask;
  while (short_[i].key.high != key.high || short_[i].key.low != key.low) {
    if (short_[i].count == 0) {
      short_[i] = {key, count};
      if (is_full(++short_used_, short_.size())) grow_short();
      return;
    }
    i = (i + 1) & mask;
  }
  short_[i].count += count;
}

void WordMap::add_long(const std::uint8_t* word, std::size_t length, std::uint64_t count) {
  const std::uint64_t hash = hash_bytes(word, length);
  const std::size_t mask = long_.size() - 1;
  std::size_t i = static_cast<std::size_t>(hash) & mask;
  for (; long_[i].count; i = (i + 1) & mask) {
    LongSlot& slot = long_[i];
    if (slot.hash == hash && slot.length == length &&
        std::memcmp(arena_.data() + slot.offset, word, length) == 0) {
      slot.count += count;
      return;
    }
  }
  long_[i] = {hash, arena_.size(), length, count};
  arena_.insert(arena_.end(), word, word + length);
  if (is_full(++long_used_, long_.size())) grow_long();
}

void WordMap::grow_short() {
  std::vector<ShortSlot> old(short_.size() * 2);
  old.swap(short_);
  const std::size_t mask = short_.size() - 1;
  for (const ShortSlot& slot : old) {
    if (slot.count == 0) continue;
    std::size_t i = hash_short(slot.key) & mask;
    while (short_[i].count) i = (i + 1) & mask;
    short_[i] = slot;
  }
}

void WordMap::grow_long() {
  std::vector<LongSlot> old(long_.size() * 2);
  old.swap(long_);
  const std::size_t mask = long_.size() - 1;
  for (const LongSlot& slot : old) {
    if (slot.count == 0) continue;
    std::size_t i = static_cast<std::size_t>(slot.hash) & mask;
    while (long_[i].count) i = (i + 1) & mask;
    long_[i] = slot;
  }
}

WordCounter::WordCounter(Pattern pattern, int threads)
    : pattern_(pattern), maps_(static_cast<std::size_t>(resolve_threads(threads))) {}

void WordCounter::add(const std::vector<std::string_view>& texts) {
  parallel_for(texts.size(), static_cast<int>(maps_.size()), [&](std::size_t i, int thread) {
    WordMap& map = maps_[static_cast<std::size_t>(thread)];
    const auto* p = reinterpret_cast<const std::uint8_t*>(texts[i].data());
    const auto* const end = p + texts[i].size();
    for_each_piece(pattern_, p, end, [&](const std::uint8_t* word, std::size_t length) {
      map.add(word, length, end, 1);
    });
  });
}

void WordCounter::add_pieces(std::string_view text, const std::int64_t* ends, std::size_t count) {
  const auto* const begin = reinterpret_cast<const std::uint8_t*>(text.data());
  std::int64_t from = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t end = ends[i];  // read once: the caller's array may change meanwhile
    if (end < from || end > static_cast<std::int64_t>(text.size())) {
      throw std::invalid_argument("the ends of the pieces must rise and lie inside the text");
    }
    if (end > from) {
      maps_[0].add(begin + from, static_cast<std::size_t>(end - from), begin + text.size(), 1);
    }
    from = end;
  }
}

WordMap WordCounter::take() {
  WordMap all = std::move(maps_[0]);
  for (std::size_t i = 1; i < maps_.size(); ++i) {
    maps_[i].for_each([&](const std::uint8_t* word, std::size_t length, std::uint64_t count) {
      all.add(word, length, word + length, count);
    });
    maps_[i] = WordMap();
  }
  maps_[0] = WordMap();
  return all;
}

}  // namespace fastgpt
