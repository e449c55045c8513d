// Bounded cache from a piece of text to its ids.
//
// Words repeat, so most pieces are looked up instead of merged. Keys are stored whole (a hash alone
// could return the ids of another word). Two entries share a bucket and the older one is replaced,
// so memory is fixed and hostile input can only miss.
#pragma once

#include <cstdint>
#include <cstring>

#include "hash.h"
#include "zeroed_memory.h"

namespace fastgpt {

// kWords * 8 bytes of key, the last byte of which is the length; room for kIds ids.
template <int kWords, int kIds>
class PieceCache {
 public:
  static constexpr int kMaxLength = kWords * 8 - 1;

  struct Key {
    std::uint64_t word[kWords];
  };

  explicit PieceCache(int bucket_bits)
      : shift_(64 - bucket_bits), memory_((std::size_t{2} << bucket_bits) * sizeof(Entry)) {
    entries_ = static_cast<Entry*>(memory_.data());
  }

  static Key make_key(const std::uint8_t* p, std::size_t length, const std::uint8_t* end) {
    Key key;
    pack_bytes(p, length, end, key.word);
    return key;
  }

  // Where the key would be; the memory starts to be fetched.
  std::size_t locate(const Key& key) const {
    std::uint64_t hash = 0;
    for (const std::uint64_t word : key.word) hash = mix(hash, word);
    const auto place = static_cast<std::size_t>((hash * 0xD6E8FEB86659FD93ull) >> shift_) * 2;
    prefetch(&entries_[place]);
    return place;
  }

  // Copies the ids to out, which must have room for kIds, and returns their number; 0 is a miss,
  // kElsewhere a piece that was noted without its ids.
  int find(const Key& key, std::size_t place, std::uint32_t* out) const {
    const Entry* bucket = &entries_[place];
    for (int way = 0; way < 2; ++way) {
      if (same(bucket[way].key, key)) {
        std::memcpy(out, bucket[way].ids, sizeof bucket[way].ids);
        return count_of(bucket[way]);
      }
    }
    return 0;
  }

  // Returns false if there are too many ids to keep.
  bool insert(const Key& key, std::size_t place, const std::uint32_t* ids, std::size_t count) {
    if (count > kMostIds) return false;
    std::memcpy(entry_for(key, place, kWide ? 1 : count).ids, ids, count * sizeof *ids);
    if (kWide) entries_[place].ids[kIds - 1] = static_cast<std::uint32_t>(count);
    return true;
  }

  // Notes that another cache may have the ids of this piece.
  void insert_elsewhere(const Key& key, std::size_t place) { entry_for(key, place, kElsewhere); }

  static constexpr int kElsewhere = 8;

 private:
  // The last key byte holds the length (at most 31) and above it the number of ids less one; wide
  // entries have the number in their last id.
  static constexpr int kCountShift = 61;
  static constexpr std::uint64_t kCountMask = 7ull << kCountShift;
  static constexpr bool kWide = kIds >= kElsewhere;
  static constexpr std::size_t kMostIds = kWide ? kIds - 1 : kIds;
  static_assert(kMaxLength < 32);

  struct Entry {
    Key key;
    std::uint32_t ids[kIds];
  };

  Entry& entry_for(const Key& key, std::size_t place, std::size_t count) {
    Entry* bucket = &entries_[place];
    if (bucket[0].key.word[kWords - 1]) bucket[1] = bucket[0];
    bucket[0].key = key;
    bucket[0].key.word[kWords - 1] |= static_cast<std::uint64_t>(count - 1) << kCountShift;
    return bucket[0];
  }

  static int count_of(const Entry& entry) {
    if (kWide) return static_cast<int>(entry.ids[kIds - 1]);
    return static_cast<int>(entry.key.word[kWords - 1] >> kCountShift) + 1;
  }

  static bool same(const Key& stored, const Key& key) {
    std::uint64_t different = (stored.word[kWords - 1] & ~kCountMask) ^ key.word[kWords - 1];
    for (int i = 0; i + 1 < kWords; ++i) different |= stored.word[i] ^ key.word[i];
    return different == 0;
  }

  static void prefetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
  }

  int shift_;
  ZeroedMemory memory_;
  Entry* entries_;
};

}  // namespace fastgpt
