// The caches of pieces filled until they grow, replace and forget; for sanitizer builds.
// Usage: fuzz_caches SEED SECONDS. Prints the number of rounds; aborts on the first difference.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "fuzzing.h"
#include "hash.h"
#include "long_cache.h"
#include "short_cache.h"

using namespace fastgpt;

namespace {

using Ids = std::vector<std::uint32_t>;

const std::uint8_t* bytes_of(const std::string& text) {
  return reinterpret_cast<const std::uint8_t*>(text.data());
}

// Piece i of this many bytes, and its ids: both follow from i alone.
std::string piece_of(std::uint64_t i, std::size_t length) {
  std::string piece(length, static_cast<char>('a' + i % 7));
  const std::uint64_t number = mix(mix(mix(0, i), length), 1);
  std::memcpy(&piece[0], &number, std::min<std::size_t>(length, 8));
  return piece;
}

Ids ids_of(std::uint64_t i, std::size_t count) {
  Ids ids(count);
  for (std::size_t k = 0; k < count; ++k) ids[k] = static_cast<std::uint32_t>(i * 31 + k);
  return ids;
}

// Whatever was inserted is found with its own ids or not at all; next to nothing is lost before the
// table has its full size. Pieces come from memory that ends with them, so a read past the end is
// seen.
void check_short_cache(std::uint64_t pieces) {
  ShortCache cache;
  std::uint64_t lost = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (std::uint64_t i = 0; i < pieces; ++i) {
      const std::string text = piece_of(i, 8 + i % 8);
      const std::vector<std::uint8_t> exact(text.begin(), text.end());
      const std::uint8_t* const end = exact.data() + exact.size();
      const ShortCache::View view = cache.make_room(1);
      const ShortCache::Key key = PieceKey::of(exact.data(), exact.size(), end);
      const std::string longer = text + "something behind it";
      const ShortCache::Key same =
          PieceKey::of(bytes_of(longer), text.size(), bytes_of(longer) + longer.size());
      require(key.low == same.low && key.high == same.high, "a key is its piece alone");
      const ShortCache::Bucket* const place = view.locate(key);
      const Ids ids = ids_of(i, 1 + i % ShortCache::kMaxIds);
      std::uint32_t found[ShortCache::kMaxIds];
      std::size_t count = ShortCache::find(key, place, found);
      if (const ShortCache::Entry* const entry = cache.look_around(key, place)) {
        require(count == 0 || count == entry->count(), "both ways of looking agree");
        count = entry->count();
        std::memcpy(found, entry->ids, sizeof found);
      } else {
        require(count == 0, "an entry that looking around does not find");
      }
      if (count) {
        require(Ids(found, found + count) == ids, "ids of a short piece");
      } else {
        lost += pass;
        std::memcpy(cache.insert(key, place, ids.size()).ids, ids.data(), 4 * ids.size());
      }
    }
  }
  require(lost <= pieces / 50 || pieces > 200'000, "a small cache loses next to nothing");
  require(lost > pieces / 4 || pieces < 1'600'000, "a full cache is bounded");
}

void check_long_cache(std::uint64_t pieces) {
  LongCache cache;
  std::uint64_t lost = 0;
  std::vector<LongCache::Place> places;
  for (int pass = 0; pass < 2; ++pass) {
    for (std::uint64_t i = 0; i < pieces; ++i) {
      const std::string text = piece_of(i, 16 + i % 16);
      const std::vector<std::uint8_t> exact(text.begin(), text.end());
      const std::uint8_t* const end = exact.data() + exact.size();
      const std::uint32_t hash = LongCache::hash(exact.data(), exact.size(), end);
      const std::string longer = text + "and this is what comes behind it";
      require(
          hash == LongCache::hash(bytes_of(longer), text.size(), bytes_of(longer) + longer.size()),
          "a hash is of its piece alone");
      const Ids ids = ids_of(i, 1 + i % 40);
      const LongCache::Ids found = cache.find(exact.data(), exact.size(), hash);
      if (found.data) {
        require(Ids(found.data, found.data + found.count) == ids, "ids of a long piece");
      } else {
        lost += pass;
        cache.insert(exact.data(), exact.size(), hash, ids.data(), ids.size());
      }
      if (pass == 0) places.push_back(cache.insert(ids.data(), ids.size()));
      const std::size_t other = below(places.size());
      const LongCache::Ids kept = cache.at(places[other]);
      if (kept.data) {
        require(Ids(kept.data, kept.data + kept.count) == ids_of(other, 1 + other % 40),
                "ids by their place");
      }
    }
  }
  require(lost <= pieces / 50 || pieces > 50'000, "a small cache loses next to nothing");
  require(lost > 0 || pieces < 400'000, "a full cache is bounded");
}

}  // namespace

int main(int argc, char** argv) {
  check_short_cache(1'600'000);
  check_long_cache(400'000);
  return fuzz(argc, argv, 12, [] {
    check_short_cache(below(20'000));
    check_long_cache(below(5'000));
  });
}
