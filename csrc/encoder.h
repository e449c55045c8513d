// Byte-level BPE: text <-> ids for one vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "id_array.h"
#include "long_cache.h"
#include "longest_first.h"
#include "merge_table.h"
#include "pretokenizer.h"
#include "short_cache.h"
#include "token_buffer.h"

namespace fastgpt {

struct Vocabulary {
  Pattern pattern;
  std::vector<std::string> tokens;  // by id; an empty one is an id that stands for nothing
  std::vector<Merge> merges;        // by rank
  std::vector<std::pair<std::string, std::uint32_t>> specials;
  // A piece that is a token as it stands becomes that token, whatever the merges say (tiktoken;
  // `ignore_merges` of Hugging Face).
  bool whole_pieces = false;
};

// What one thread needs while it encodes.
struct EncodeState {
  ShortCache short_pieces;
  LongCache long_pieces;
  TokenBuffer ids;  // for callers, as the text
  ByteBuffer text;
  struct Node {
    std::uint32_t id;
    std::uint32_t prev;
    std::uint32_t next;
    std::uint32_t rank;
  };
  std::vector<Node> nodes;
  std::vector<std::uint64_t> heap;
};

// Immutable but for a pool of EncodeStates; any number of threads may use one Encoder.
class Encoder {
 public:
  // Throws std::invalid_argument if the vocabulary is inconsistent: a byte without a token, an id
  // out of range, a merge whose token is not its two parts, an empty or doubled special token.
  explicit Encoder(Vocabulary vocabulary);

  // A state from the pool, back to which it goes when the pointer dies.
  struct Release {
    const Encoder* owner;
    void operator()(EncodeState* state) const;
  };
  using State = std::unique_ptr<EncodeState, Release>;
  State acquire() const;

  // Appends the ids of text, in which no special token is looked for.
  void encode(std::string_view text, EncodeState& state, TokenBuffer& out) const;

  // The same with little work space, a part of the text after the other.
  void encode(std::string_view text, EncodeState& state, IdArray& out) const;

  // The text in parts that may be encoded apart: cut where every pattern does, if it is anywhere.
  static constexpr std::size_t kPart = std::size_t{1} << 16;  // bytes of most parts
  static std::vector<std::string_view> parts(std::string_view text);

  // As encode(), but the strings of these special tokens (places in Vocabulary::specials) become
  // their ids. The leftmost one wins, of those that start together the longest.
  void encode_with_specials(std::string_view text, const std::vector<std::size_t>& allowed,
                            EncodeState& state, TokenBuffer& out) const;

  // Appends the bytes that ids stand for; throws std::invalid_argument naming the first id without
  // a token. `before` ids were decoded before these.
  template <class Id>
  void decode(const Id* ids, std::size_t count, ByteBuffer& out, std::size_t before = 0) const;
  // Throws that exception.
  [[noreturn]] void refuse(const std::string& id, std::size_t position) const;

  std::size_t vocab_size() const { return offsets_.size() - 1; }
  const Vocabulary& vocabulary() const { return vocabulary_; }

 private:
  static constexpr std::size_t kShortMerge = 32;

  void encode_rare(const std::uint8_t* p, std::size_t length, const ShortCache::Key& key,
                   ShortCache::Bucket* bucket, EncodeState& state, TokenBuffer& out) const;
  void encode_long(const std::uint8_t* p, std::size_t length, std::uint32_t hash,
                   EncodeState& state, TokenBuffer& out) const;
  void merge_piece(const std::uint8_t* p, std::size_t length, EncodeState& state,
                   TokenBuffer& out) const;
  bool prefers_longest_first(const std::uint8_t* p, std::size_t length) const;
  void merge_short(const std::uint8_t* p, std::size_t length, TokenBuffer& out) const;
  void merge_long(const std::uint8_t* p, std::size_t length, EncodeState& state,
                  TokenBuffer& out) const;
  template <class Id>
  void append_token(Id id, std::size_t position, ByteBuffer& out) const;
  void index_bytes();
  void index_specials();
  void check_merges() const;
  void index_whole_pieces();

  Vocabulary vocabulary_;
  MergeTable merges_;
  std::uint32_t byte_id_[256];
  std::optional<LongestFirst> longest_first_;
  std::vector<std::uint32_t> byte_pair_rank_;  // [first byte << 8 | second byte]
  // Tokens that their own merges do not lead to; filled only if vocabulary_.whole_pieces.
  std::unordered_map<std::string, std::uint32_t> unreachable_;
  std::string bytes_;                   // of all ids, one behind the other
  std::vector<std::uint64_t> offsets_;  // of id i: [offsets_[i], offsets_[i + 1])
  // The same for most ids in one place, so that decoding goes to memory once an id.
  struct Spelling {
    char bytes[15];
    std::uint8_t length;  // 0: longer, or an id without a token
  };
  std::vector<Spelling> spellings_;
  mutable std::mutex pool_mutex_;
  mutable std::vector<std::unique_ptr<EncodeState>> pool_;
};

}  // namespace fastgpt
