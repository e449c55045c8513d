// Bounded cache from short pieces of text to their few ids: most of a text becomes ids here.
//
// Keys are stored whole (a hash alone could return the ids of another word). Two entries share a
// line of the processor's cache and are compared without a branch, for nothing predicts which of
// them it is. The table grows with the number of distinct pieces up to a fixed size; from then on
// new pieces replace old ones, so hostile input can only miss.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "piece_key.h"
#include "zeroed_memory.h"

namespace fastgpt {

class ShortCache {
 public:
  using Key = PieceKey;
  static constexpr std::size_t kMaxIds = 4;

  struct Entry {
    Key key;  // above its length the number of ids less one
    std::uint32_t ids[kMaxIds];

    std::size_t count() const { return static_cast<std::size_t>(key.high >> kCountShift) + 1; }
  };

  // A count that says that the ids of an entry are what the user makes of them.
  static constexpr std::size_t kElsewhere = 8;

  // Where an entry belongs.
  struct Bucket {
    Entry way[2];
  };

  // The table as it is until the next make_room().
  struct View {
    Bucket* buckets;
    int shift;

    // The memory starts to be fetched.
    Bucket* locate(const Key& key) const {
      // Multiplied apart, since two multiplications one after the other take twice as long.
      const std::uint64_t hash = key.low * 0x9E3779B97F4A7C15ull ^ key.high * 0xD6E8FEB86659FD93ull;
      Bucket* const bucket = buckets + (hash >> shift);
#if defined(__GNUC__)
      __builtin_prefetch(bucket);
#endif
      return bucket;
    }
  };

  ShortCache() : ShortCache(kFirstBits) {}

  // For some more pieces that are looked for and perhaps inserted.
  View make_room(std::size_t pieces) {
    if (used_ + pieces > (std::size_t{1} << bits_) && bits_ < kMostBits) grow();
    return view();
  }

  // Writes the ids to out, which has room for kMaxIds, and returns their number. 0 is for the
  // pieces that look_around() may know more of.
  static std::size_t find(const Key& key, const Bucket* bucket, std::uint32_t* out) {
    const bool first = same(bucket->way[0].key, key);
    const bool second = same(bucket->way[1].key, key);
    const Entry& entry = bucket->way[first ? 0 : 1];
    std::memcpy(out, entry.ids, sizeof entry.ids);
    const std::size_t count = entry.count();
    const bool here = (first | second) & (count <= kMaxIds);
    return here ? count : 0;
  }

  // The entry of the key, nullptr if there is none.
  Entry* look_around(const Key& key, const Bucket* bucket) const {
    for (std::size_t step = 0; step < kSteps; ++step) {
      for (Entry& entry : bucket_after(bucket, step).way) {
        if (same(entry.key, key)) return &entry;
        if (entry.key.high == 0) return nullptr;
      }
    }
    return nullptr;
  }

  // Makes the entry of a key that has none, of a piece of at most PieceKey::kMaxLength bytes. Its
  // ids are to be written by the caller.
  Entry& insert(const Key& key, const Bucket* bucket, std::size_t count) {
    Entry& entry = free_entry(bucket);
    entry.key = key;
    entry.key.high |= static_cast<std::uint64_t>(count - 1) << kCountShift;
    return entry;
  }

 private:
  static constexpr int kFirstBits = 12;     // 2^bits buckets
  static constexpr int kMostBits = 19;      // 32 MB
  static constexpr std::size_t kSteps = 4;  // buckets that an entry may lie in
  static constexpr int kCountShift = 61;

  explicit ShortCache(int bits)
      : bits_(bits), shift_(64 - bits), memory_((std::size_t{1} << bits) * sizeof(Bucket)) {
    buckets_ = static_cast<Bucket*>(memory_.data());
  }

  static bool same(const Key& stored, const Key& key) {
    return ((stored.low ^ key.low) | (stored.high ^ key.high) << (64 - kCountShift)) == 0;
  }

  View view() const { return {buckets_, shift_}; }

  Bucket& bucket_after(const Bucket* bucket, std::size_t steps) const {
    const std::size_t mask = (std::size_t{1} << bits_) - 1;
    return buckets_[(static_cast<std::size_t>(bucket - buckets_) + steps) & mask];
  }

  Entry& free_entry(const Bucket* bucket) {
    for (std::size_t step = 0; step < kSteps; ++step) {
      for (Entry& entry : bucket_after(bucket, step).way) {
        if (entry.key.high == 0) {
          ++used_;
          return entry;
        }
      }
    }
    return bucket_after(bucket, 0).way[++replaced_ & 1];
  }

  void grow() {
    ShortCache larger(bits_ + 2 < kMostBits ? bits_ + 2 : kMostBits);
    const std::size_t size = std::size_t{1} << bits_;
    for (std::size_t i = 0; i < size; ++i) {
      for (const Entry& entry : buckets_[i].way) {
        if (entry.key.high == 0) continue;
        Key key = entry.key;
        key.high &= ~std::uint64_t{0} >> (64 - kCountShift);
        larger.free_entry(larger.view().locate(key)) = entry;
      }
    }
    larger.replaced_ = replaced_;
    swap(larger);
  }

  void swap(ShortCache& other) {
    std::swap(bits_, other.bits_);
    std::swap(shift_, other.shift_);
    std::swap(used_, other.used_);
    std::swap(replaced_, other.replaced_);
    std::swap(buckets_, other.buckets_);
    memory_.swap(other.memory_);
  }

  int bits_;
  int shift_;
  std::size_t used_ = 0;
  std::size_t replaced_ = 0;
  ZeroedMemory memory_;
  Bucket* buckets_;
};

}  // namespace fastgpt
