#include "encoder.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "parallel.h"
#include "piece_finder.h"

namespace fastgpt {
namespace {

constexpr std::uint32_t kNone = MergeTable::kNone;
constexpr std::uint32_t kEnd = 0xFFFFFFFF;  // no neighbour
// A state keeps the work space of pieces up to this many bytes, and of texts up to this many ids
// and bytes; larger ones are given back.
constexpr std::size_t kKeepNodes = std::size_t{1} << 20;
constexpr std::size_t kKeepIds = std::size_t{1} << 20;
constexpr std::size_t kKeepText = std::size_t{1} << 22;

// The end of a part of text from `begin` on: between a letter and a blank, where every pattern cuts
// whatever stands around them.
std::size_t part_end(std::string_view text, std::size_t begin) {
  if (text.size() - begin < 2 * Encoder::kPart) return text.size();
  for (std::size_t at = begin + Encoder::kPart; at < text.size(); ++at) {
    const char blank = text[at];
    const char letter = static_cast<char>(text[at - 1] | 0x20);
    if ((blank == ' ' || blank == '\n') && letter >= 'a' && letter <= 'z') return at;
  }
  return text.size();
}

void check_limits(const Vocabulary& vocabulary) {
  if (vocabulary.tokens.size() > MergeTable::kMaxIds) {
    throw std::invalid_argument("more than " + std::to_string(MergeTable::kMaxIds) + " ids");
  }
  if (vocabulary.merges.size() > MergeTable::kMaxMerges) {
    throw std::invalid_argument("more than " + std::to_string(MergeTable::kMaxMerges) + " merges");
  }
  for (std::size_t rank = 0; rank < vocabulary.merges.size(); ++rank) {
    const Merge& merge = vocabulary.merges[rank];
    if (std::max({merge.left, merge.right, merge.id}) >= vocabulary.tokens.size()) {
      throw std::invalid_argument("merge " + std::to_string(rank) + " uses an id without a token");
    }
  }
}

}  // namespace

Encoder::Encoder(Vocabulary vocabulary)
    : vocabulary_((check_limits(vocabulary), std::move(vocabulary))), merges_(vocabulary_.merges) {
  check_merges();
  index_bytes();
  index_specials();
  longest_first_.emplace(vocabulary_.tokens, vocabulary_.merges, merges_, byte_id_);
  if (vocabulary_.whole_pieces) index_whole_pieces();
}

void Encoder::check_merges() const {
  const auto& tokens = vocabulary_.tokens;
  for (std::size_t rank = 0; rank < vocabulary_.merges.size(); ++rank) {
    const auto& [left, right, id] = vocabulary_.merges[rank];
    if (tokens[left].empty() || tokens[right].empty() ||
        tokens[id] != tokens[left] + tokens[right]) {
      throw std::invalid_argument("merge " + std::to_string(rank) +
                                  " does not lead from two tokens to the one of both their bytes");
    }
  }
}

void Encoder::index_bytes() {
  std::fill(std::begin(byte_id_), std::end(byte_id_), kEnd);
  for (std::uint32_t id = 0; id < vocabulary_.tokens.size(); ++id) {
    const std::string& token = vocabulary_.tokens[id];
    if (token.size() == 1) byte_id_[static_cast<std::uint8_t>(token[0])] = id;
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (byte_id_[byte] == kEnd) {
      throw std::invalid_argument("no token for the byte " + std::to_string(byte) +
                                  "; byte-level BPE needs all 256");
    }
  }
  byte_pair_rank_.resize(65536);
  for (std::uint32_t pair = 0; pair < 65536; ++pair) {
    byte_pair_rank_[pair] = merges_.rank(byte_id_[pair >> 8], byte_id_[pair & 0xFF]);
  }
}

void Encoder::index_specials() {
  std::vector<std::string_view> all(vocabulary_.tokens.begin(), vocabulary_.tokens.end());
  for (const auto& [text, id] : vocabulary_.specials) {
    if (text.empty()) throw std::invalid_argument("a special token is the empty string");
    if (id >= MergeTable::kMaxIds) {
      throw std::invalid_argument("special token id " + std::to_string(id) + " is too large");
    }
    if (id >= all.size()) all.resize(id + 1);
    if (!all[id].empty()) {
      throw std::invalid_argument("id " + std::to_string(id) + " of special token '" + text +
                                  "' is taken");
    }
    all[id] = text;
  }
  offsets_.assign(1, 0);
  for (const std::string_view token : all) {
    bytes_ += token;
    offsets_.push_back(bytes_.size());
    Spelling spelling{};
    if (token.size() <= sizeof spelling.bytes) {
      std::copy(token.begin(), token.end(), spelling.bytes);
      spelling.length = static_cast<std::uint8_t>(token.size());
    }
    spellings_.push_back(spelling);
  }
}

void Encoder::index_whole_pieces() {
  EncodeState state;
  for (std::uint32_t id = 0; id < vocabulary_.tokens.size(); ++id) {
    const std::string& token = vocabulary_.tokens[id];
    if (token.empty()) continue;
    TokenBuffer ids;
    merge_piece(reinterpret_cast<const std::uint8_t*>(token.data()), token.size(), state, ids);
    if (ids.size() != 1 || ids.data()[0] != id) unreachable_.emplace(token, id);
  }
}

Encoder::State Encoder::acquire() const {
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  if (pool_.empty()) return State(new EncodeState, Release{this});
  State state(pool_.back().release(), Release{this});
  pool_.pop_back();
  return state;
}

void Encoder::Release::operator()(EncodeState* state) const {
  std::unique_ptr<EncodeState> owned(state);
  if (state->ids.capacity() > kKeepIds) TokenBuffer().swap(state->ids);
  if (state->text.capacity() > kKeepText) ByteBuffer().swap(state->text);
  const std::lock_guard<std::mutex> lock(owner->pool_mutex_);
  owner->pool_.push_back(std::move(owned));
}

// In two steps over some pieces at a time, so that the places in the cache are on their way from
// memory while the keys of the next pieces are being made.
void Encoder::encode(std::string_view text, EncodeState& state, TokenBuffer& out) const {
  struct Place {
    ShortCache::Key key;
    ShortCache::Bucket* bucket;
  };
  const PieceFinder find = piece_finder(vocabulary_.pattern);
  const std::uint8_t* ends[kMaxFound];
  Place places[kMaxFound];
  const auto* p = reinterpret_cast<const std::uint8_t*>(text.data());
  const auto* const end = p + text.size();
  while (p < end) {
    const std::size_t count = find(p, end, ends);
    const ShortCache::View view = state.short_pieces.make_room(count);
    const std::uint8_t* begin = p;
    for (std::size_t i = 0; i < count; ++i) {
      const auto length = static_cast<std::size_t>(ends[i] - begin);
      places[i].key = PieceKey::of(begin, length, end);
      places[i].bucket = view.locate(places[i].key);
      if (length > PieceKey::kMaxLength && length <= LongCache::kMaxLength) {
        const std::uint32_t hash = LongCache::hash(begin, length, end);
        places[i].key.low = hash;  // no entry of the short cache has the other half of the key
        state.long_pieces.prefetch(hash);
      }
      begin = ends[i];
    }
    std::uint32_t* ids = out.room(count * ShortCache::kMaxIds);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t found = ShortCache::find(places[i].key, places[i].bucket, ids);
      ids += found;
      if (found == 0) {
        out.advance_to(ids);
        encode_rare(p, static_cast<std::size_t>(ends[i] - p), places[i].key, places[i].bucket,
                    state, out);
        ids = out.room((count - i) * ShortCache::kMaxIds);
      }
      p = ends[i];
    }
    out.advance_to(ids);
  }
}

// A piece that is not short, or has many ids, or is new.
void Encoder::encode_rare(const std::uint8_t* p, std::size_t length, const ShortCache::Key& key,
                          ShortCache::Bucket* bucket, EncodeState& state, TokenBuffer& out) const {
  if (length > PieceKey::kMaxLength) {
    return encode_long(p, length, static_cast<std::uint32_t>(key.low), state, out);
  }
  ShortCache::Entry* entry = state.short_pieces.look_around(key, bucket);
  if (entry) {
    std::size_t count = entry->count();
    const std::uint32_t* ids = entry->ids;
    if (count == ShortCache::kElsewhere) {
      const LongCache::Ids found = state.long_pieces.at({entry->ids[0], entry->ids[1]});
      ids = found.data;
      count = found.count;
    }
    if (ids) return out.append(ids, count);
  }
  const std::size_t before = out.size();
  merge_piece(p, length, state, out);
  const std::uint32_t* const ids = out.data() + before;
  const std::size_t count = out.size() - before;
  const bool few = count <= ShortCache::kMaxIds;
  if (!entry) {
    entry = &state.short_pieces.insert(key, bucket, few ? count : ShortCache::kElsewhere);
  }
  if (few) {
    std::memcpy(entry->ids, ids, count * sizeof *ids);
  } else {
    const LongCache::Place kept = state.long_pieces.insert(ids, count);
    entry->ids[0] = kept.word;
    entry->ids[1] = kept.generation;
  }
}

void Encoder::encode_long(const std::uint8_t* p, std::size_t length, std::uint32_t hash,
                          EncodeState& state, TokenBuffer& out) const {
  if (length > LongCache::kMaxLength) return merge_piece(p, length, state, out);
  const LongCache::Ids found = state.long_pieces.find(p, length, hash);
  if (found.data) return out.append(found.data, found.count);
  const std::size_t before = out.size();
  merge_piece(p, length, state, out);
  state.long_pieces.insert(p, length, hash, out.data() + before, out.size() - before);
}

void Encoder::merge_piece(const std::uint8_t* p, std::size_t length, EncodeState& state,
                          TokenBuffer& out) const {
  if (!unreachable_.empty()) {
    const auto found = unreachable_.find(std::string(reinterpret_cast<const char*>(p), length));
    if (found != unreachable_.end()) return out.push(found->second);
  }
  if (length == 1) {
    out.push(byte_id_[*p]);
  } else if (prefers_longest_first(p, length)) {
    out.advance(longest_first_->encode(p, length, out.room(length)));
  } else if (length <= kShortMerge) {
    merge_short(p, length, out);
  } else {
    merge_long(p, length, state, out);
  }
}

// Short ASCII merges in few steps within tables that the processor has at hand.
inline bool Encoder::prefers_longest_first(const std::uint8_t* p, std::size_t length) const {
  return longest_first_->usable() && (length > kShortMerge || (p[0] | p[1]) >= 0x80);
}

// Repeated search for the lowest rank: quadratic, but the fastest while everything fits in a line
// or two of cache.
void Encoder::merge_short(const std::uint8_t* p, std::size_t length, TokenBuffer& out) const {
  std::uint32_t rank[kShortMerge];  // of the pair that starts at i
  std::uint32_t* const id = out.room(length);
  for (std::size_t i = 0; i + 1 < length; ++i) {
    rank[i] = byte_pair_rank_[static_cast<std::size_t>(p[i]) << 8 | p[i + 1]];
    id[i] = byte_id_[p[i]];
  }
  id[length - 1] = byte_id_[p[length - 1]];
  std::size_t count = length;
  while (count > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < count; ++i) {
      if (rank[i] < rank[best]) best = i;
    }
    if (rank[best] == kNone) break;
    id[best] = merges_.id(rank[best]);
    --count;
    for (std::size_t i = best + 1; i < count; ++i) id[i] = id[i + 1];
    for (std::size_t i = best; i + 1 < count; ++i) rank[i] = rank[i + 1];
    if (best > 0) rank[best - 1] = merges_.rank(id[best - 1], id[best]);
    if (best + 1 < count) rank[best] = merges_.rank(id[best], id[best + 1]);
  }
  out.advance(count);
}

// The same merges in the same order from a heap of (rank, position): n log n.
void Encoder::merge_long(const std::uint8_t* p, std::size_t length, EncodeState& state,
                         TokenBuffer& out) const {
  if (length >= kEnd) throw std::invalid_argument("one word of the text is longer than 4 GiB");
  auto& nodes = state.nodes;
  auto& heap = state.heap;
  const auto count = static_cast<std::uint32_t>(length);
  nodes.resize(count);
  heap.clear();
  const auto entry = [](std::uint32_t rank, std::uint32_t at) {
    return static_cast<std::uint64_t>(rank) << 32 | at;
  };
  for (std::uint32_t i = 0; i < count; ++i) {
    const bool last = i + 1 == count;
    const std::uint32_t rank =
        last ? kNone : byte_pair_rank_[static_cast<std::size_t>(p[i]) << 8 | p[i + 1]];
    nodes[i] = {byte_id_[p[i]], i ? i - 1 : kEnd, last ? kEnd : i + 1, rank};
    if (rank != kNone) heap.push_back(entry(rank, i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>{});
  const auto rerank = [&](std::uint32_t at) {
    EncodeState::Node& node = nodes[at];
    node.rank = node.next == kEnd ? kNone : merges_.rank(node.id, nodes[node.next].id);
    if (node.rank == kNone) return;
    heap.push_back(entry(node.rank, at));
    std::push_heap(heap.begin(), heap.end(), std::greater<>{});
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>{});
    const auto rank = static_cast<std::uint32_t>(heap.back() >> 32);
    const auto at = static_cast<std::uint32_t>(heap.back());
    heap.pop_back();
    EncodeState::Node& node = nodes[at];
    if (node.rank != rank) continue;  // one of its halves has merged elsewhere since
    EncodeState::Node& eaten = nodes[node.next];
    node.id = merges_.id(rank);
    node.next = eaten.next;
    eaten.rank = kNone;
    if (node.next != kEnd) nodes[node.next].prev = at;
    rerank(at);
    if (node.prev != kEnd) rerank(node.prev);
  }
  for (std::uint32_t at = 0; at != kEnd; at = nodes[at].next) out.push(nodes[at].id);
  if (nodes.capacity() > kKeepNodes) std::vector<EncodeState::Node>().swap(nodes);
  if (heap.capacity() > kKeepNodes) std::vector<std::uint64_t>().swap(heap);
}

std::vector<std::string_view> Encoder::parts(std::string_view text) {
  std::vector<std::string_view> parts;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = part_end(text, begin);
    parts.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return parts;
}

void Encoder::encode(std::string_view text, EncodeState& state, IdArray& out) const {
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = part_end(text, begin);
    state.ids.clear();
    encode(text.substr(begin, end - begin), state, state.ids);
    out.append(state.ids.data(), state.ids.size());
    begin = end;
  }
}

void Encoder::encode_with_specials(std::string_view text, const std::vector<std::size_t>& allowed,
                                   EncodeState& state, TokenBuffer& out) const {
  for (const std::size_t place : allowed) {
    if (place >= vocabulary_.specials.size()) {
      throw std::invalid_argument("no special token has the place " + std::to_string(place));
    }
  }
  // The next place of each special token, searched again only once the text has passed it.
  std::vector<std::size_t> next(allowed.size(), 0);
  std::size_t begin = 0;
  bool first = true;
  while (true) {
    std::size_t best = std::string_view::npos;
    std::size_t best_index = 0;
    for (std::size_t i = 0; i < allowed.size(); ++i) {
      const std::string& special = vocabulary_.specials[allowed[i]].first;
      if (first || (next[i] != std::string_view::npos && next[i] < begin)) {
        next[i] = text.find(special, begin);
      }
      const bool longer = next[i] == best && best != std::string_view::npos &&
                          special.size() > vocabulary_.specials[allowed[best_index]].first.size();
      if (next[i] < best || longer) {
        best = next[i];
        best_index = i;
      }
    }
    first = false;
    if (best == std::string_view::npos) break;
    const auto& [special, id] = vocabulary_.specials[allowed[best_index]];
    encode(text.substr(begin, best - begin), state, out);
    out.push(id);
    begin = best + special.size();
  }
  encode(text.substr(begin), state, out);
}

template <class Id>
void Encoder::decode(const Id* ids, std::size_t count, ByteBuffer& out, std::size_t before) const {
  constexpr std::size_t kStep = 1024;
  static_assert(sizeof(Spelling) == 16, "a spelling is copied as a whole");
  for (std::size_t begin = 0; begin < count; begin += kStep) {
    const std::size_t end = std::min(count, begin + kStep);
    char* place = out.room((end - begin) * sizeof(Spelling));
    for (std::size_t i = begin; i < end; ++i) {
      const Id id = ids[i];  // read once: the caller's array may change meanwhile
      const auto index = static_cast<std::uint64_t>(id);  // a negative id becomes a huge one
      if (index < spellings_.size() && spellings_[index].length) {
        std::memcpy(place, &spellings_[index], sizeof(Spelling));  // the next overwrites the rest
        place += spellings_[index].length;
      } else {
        out.advance_to(place);
        append_token(id, before + i, out);
        place = out.room((end - i) * sizeof(Spelling));
      }
    }
    out.advance_to(place);
  }
}

template <class Id>
void Encoder::append_token(Id id, std::size_t position, ByteBuffer& out) const {
  const auto index = static_cast<std::uint64_t>(id);
  if (index >= vocab_size() || offsets_[index] == offsets_[index + 1]) {
    refuse(std::to_string(id), position);
  }
  out.append(bytes_.data() + offsets_[index], offsets_[index + 1] - offsets_[index]);
}

void Encoder::refuse(const std::string& id, std::size_t position) const {
  throw std::invalid_argument("token id " + id + " at position " + std::to_string(position) +
                              " is not in the vocabulary of " + std::to_string(vocab_size()));
}

template void Encoder::decode(const std::uint16_t*, std::size_t, ByteBuffer&, std::size_t) const;
template void Encoder::decode(const std::uint32_t*, std::size_t, ByteBuffer&, std::size_t) const;
template void Encoder::decode(const std::int32_t*, std::size_t, ByteBuffer&, std::size_t) const;
template void Encoder::decode(const std::int64_t*, std::size_t, ByteBuffer&, std::size_t) const;

}  // namespace fastgpt
