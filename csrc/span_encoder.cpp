#include "span_encoder.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace fastgpt {
namespace {

constexpr std::uint32_t kNone = MergeTable::kNone;
constexpr std::uint32_t kEnd = 0xFFFFFFFF;  // no neighbour

}  // namespace

// SplitMix64 (Steele et al. 2014): one multiplication chain a draw, any seed is a good one.
bool Dropout::draw() {
  state_ += 0x9E3779B97F4A7C15ull;
  std::uint64_t z = state_;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53 < p_;
}

// The piece as a linked list, and a heap of its candidates (rank << 32 | place).
struct SpanEncoder::Work {
  struct Node {
    std::uint32_t id;
    std::uint32_t prev;
    std::uint32_t next;
    std::uint32_t rank;  // of the merge with the next node
  };
  std::vector<Node> nodes;
  std::vector<std::uint64_t> heap;
  std::vector<std::uint64_t> dropped;

  void push(std::uint64_t candidate) {
    heap.push_back(candidate);
    std::push_heap(heap.begin(), heap.end(), std::greater<>{});
  }
  std::uint64_t pop() {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>{});
    const std::uint64_t candidate = heap.back();
    heap.pop_back();
    return candidate;
  }
};

SpanEncoder::SpanEncoder(const Vocabulary& vocabulary) : merges_(vocabulary.merges), byte_id_{} {
  for (std::uint32_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const std::string& token = vocabulary.tokens[id];
    if (token.size() == 1) byte_id_[static_cast<std::uint8_t>(token[0])] = id;
    if (vocabulary.whole_pieces && !token.empty()) whole_.emplace(token, id);
  }
}

void SpanEncoder::encode(std::string_view text, const std::int64_t* ends, std::size_t count,
                         Dropout& dropout, TokenBuffer& out) const {
  Work work;
  const auto size = static_cast<std::int64_t>(text.size());
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t end = ends[i];  // read once: the caller's array may change meanwhile
    if (end < begin || end > size) {
      throw std::invalid_argument("the ends of the pieces must rise and lie inside the text");
    }
    if (end > begin) {
      encode_piece(
          text.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)),
          dropout, work, out);
    }
    begin = end;
  }
  if (begin != size) throw std::invalid_argument("the pieces do not cover the text");
}

void SpanEncoder::encode_piece(std::string_view piece, Dropout& dropout, Work& work,
                               TokenBuffer& out) const {
  if (!whole_.empty() && !dropout.is_on()) {
    const auto found = whole_.find(piece);
    if (found != whole_.end()) return out.push(found->second);
  }
  if (piece.size() >= kEnd) throw std::invalid_argument("one word is longer than 4 GiB");
  const auto count = static_cast<std::uint32_t>(piece.size());
  auto& nodes = work.nodes;
  nodes.resize(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    const bool last = i + 1 == count;
    nodes[i] = {byte_id_[static_cast<std::uint8_t>(piece[i])], i ? i - 1 : kEnd,
                last ? kEnd : i + 1, kNone};
  }
  const auto rank_at = [&](std::uint32_t at) {
    Work::Node& node = nodes[at];
    node.rank = node.next == kEnd ? kNone : merges_.rank(node.id, nodes[node.next].id);
    if (node.rank != kNone) work.push(static_cast<std::uint64_t>(node.rank) << 32 | at);
  };
  work.heap.clear();
  work.dropped.clear();
  for (std::uint32_t i = 0; i < count; ++i) rank_at(i);
  while (!work.heap.empty()) {
    const std::uint64_t candidate = work.pop();
    const auto rank = static_cast<std::uint32_t>(candidate >> 32);
    const auto at = static_cast<std::uint32_t>(candidate);
    if (nodes[at].rank != rank) continue;  // one of its halves has merged elsewhere since
    if (dropout.is_on() && dropout.draw()) {
      work.dropped.push_back(candidate);
      continue;
    }
    for (const std::uint64_t left_out : work.dropped) work.push(left_out);
    work.dropped.clear();
    Work::Node& node = nodes[at];
    Work::Node& eaten = nodes[node.next];
    node.id = merges_.id(rank);
    node.next = eaten.next;
    eaten.rank = kNone;
    if (node.next != kEnd) nodes[node.next].prev = at;
    rank_at(at);
    if (node.prev != kEnd) rank_at(node.prev);
  }
  for (std::uint32_t at = 0; at != kEnd; at = nodes[at].next) out.push(nodes[at].id);
}

}  // namespace fastgpt
