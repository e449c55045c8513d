#include "longest_first.h"

#include <algorithm>
#include <cstring>
#include <queue>

namespace fastgpt {
namespace {

constexpr std::uint32_t kMaxBase = (1u << 23) - 1;

// Sorted tokens that share their first `depth` bytes.
struct Range {
  std::uint32_t begin;
  std::uint32_t end;
  std::uint32_t depth;
  std::uint32_t least;  // id among them: tokens of small ids are frequent
  std::uint32_t place;  // of the node of those bytes: two bytes, or a cell

  bool operator<(const Range& other) const { return least > other.least; }
};

// Calls f(range, byte) for the ranges of the tokens that share one byte more.
template <class F>
void for_each_byte(const std::vector<std::string>& tokens, const std::vector<std::uint32_t>& sorted,
                   const Range& range, F&& f) {
  for (std::uint32_t i = range.begin; i < range.end;) {
    if (tokens[sorted[i]].size() == range.depth) {  // shorter than the others, so the first
      ++i;
      continue;
    }
    const char byte = tokens[sorted[i]][range.depth];
    Range next{i, i, range.depth + 1, sorted[i], 0};
    for (; i < range.end && tokens[sorted[i]][range.depth] == byte; ++i) {
      next.least = std::min(next.least, sorted[i]);
    }
    next.end = i;
    f(next, static_cast<std::uint8_t>(byte));
  }
}

// Cells of a double array as they are taken.
class Plot {
 public:
  // A base, not given out before, from which the cells of all bytes (ascending) are free.
  std::uint32_t claim(const std::vector<std::uint8_t>& bytes) {
    // Families go where little is taken, single children into the holes between them.
    constexpr int kTries = 32;
    std::size_t& cursor = bytes.size() == 1 ? single_ : family_;
    while (at(taken_, cursor)) ++cursor;
    std::size_t cell = cursor;
    for (int tries = 0; tries < kTries; ++tries) {
      if (fits(cell - bytes[0], bytes)) return take(cell - bytes[0], bytes);
      do ++cell;
      while (at(taken_, cell));
    }
    cursor = cell;
    return take(std::max(taken_.size(), bases_.size()), bytes);
  }

 private:
  static bool at(const std::vector<bool>& bits, std::size_t i) {
    return i < bits.size() && bits[i];
  }

  bool fits(std::size_t base, const std::vector<std::uint8_t>& bytes) const {
    if (at(bases_, base)) return false;
    for (const std::uint8_t byte : bytes) {
      if (at(taken_, base + byte)) return false;
    }
    return true;
  }

  std::uint32_t take(std::size_t base, const std::vector<std::uint8_t>& bytes) {
    if (bases_.size() <= base) bases_.resize(base + 1);
    bases_[base] = true;
    if (taken_.size() <= base + 255) taken_.resize(base + 256);
    for (const std::uint8_t byte : bytes) taken_[base + byte] = true;
    return static_cast<std::uint32_t>(base);
  }

  std::vector<bool> taken_;
  std::vector<bool> bases_;
  std::size_t single_ = 256;  // no base is 0
  std::size_t family_ = 256;
};

}  // namespace

LongestFirst::LongestFirst(const std::vector<std::string>& tokens, const std::vector<Merge>& merges,
                           const MergeTable& table, const std::uint32_t* byte_id)
    : table_(table), tokens_(tokens.size()) {
  std::copy(byte_id, byte_id + 256, byte_id_);
  for (const std::uint32_t id : byte_id_) tokens_[id].time = 0;
  for (const Merge& merge : merges) tokens_[merge.left].followers |= bit_of(merge.right);
  if (derive(merges)) plant(tokens);
}

// Finds for each token the one merge that makes it of its own bytes, if there is one. Returns false
// where ranks do not tell which of two merges comes first.
bool LongestFirst::derive(const std::vector<Merge>& merges) {
  for (std::uint32_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right, id] = merges[rank];
    const std::uint32_t time = rank + 1;
    if (table_.rank(left, right) != rank) return false;  // listed twice
    if (tokens_[left].time == kNever || tokens_[right].time == kNever) continue;
    if (!may_stand(left, right, time)) continue;
    Token& token = tokens_[id];
    if (token.time != kNever) return false;
    token.time = time;
    token.left = left;
    token.right = right;
  }
  for (std::uint32_t rank = 0; rank < merges.size(); ++rank) {
    const std::uint32_t left = tokens_[merges[rank].left].time;
    const std::uint32_t right = tokens_[merges[rank].right].time;
    if (left == kNever || right == kNever) continue;  // never happens
    if (std::max(left, right) > rank) return false;
  }
  return true;
}

// Whether the bytes of the two tokens merge to these two, if only merges before the time `limit`
// are made between them. Takes back the later of both tokens' last merges, over and over: what then
// touches must not merge earlier. Of equal merges the left one comes first.
inline bool LongestFirst::may_stand(std::uint32_t first, std::uint32_t second,
                                    std::uint32_t limit) const {
  while (true) {
    const Token& left = tokens_[first];
    const Token& right = tokens_[second];
    if (left.followers & bit_of(second)) {
      const std::uint32_t rank = table_.rank(first, second);
      if (rank != MergeTable::kNone && rank + 1 < limit) return false;
    }
    if (left.time > right.time) {
      limit = left.time;
      first = left.right;
    } else if (right.time > 0) {
      limit = right.time + 1;
      second = right.left;
    } else {
      return true;
    }
  }
}

// Builds the tree of all tokens that merging can lead to, frequent ones first and so close
// together.
void LongestFirst::plant(const std::vector<std::string>& tokens) {
  std::vector<std::uint32_t> sorted;
  for (std::uint32_t id = 0; id < tokens.size(); ++id) {
    if (tokens_[id].time != kNever) sorted.push_back(id);
  }
  std::sort(sorted.begin(), sorted.end(),
            [&](std::uint32_t a, std::uint32_t b) { return tokens[a] < tokens[b]; });
  length_.resize(tokens.size());
  shorter_.assign(tokens.size(), kNone);
  std::vector<std::uint32_t> open;  // tokens that the present one begins with
  for (const std::uint32_t id : sorted) {
    length_[id] = static_cast<std::uint32_t>(tokens[id].size());
    while (!open.empty() &&
           tokens[id].compare(0, tokens[open.back()].size(), tokens[open.back()])) {
      open.pop_back();
    }
    if (!open.empty()) shorter_[id] = open.back();
    open.push_back(id);
  }

  starts_.resize(65536);
  cells_.resize(1);
  std::priority_queue<Range> ranges;
  for_each_byte(tokens, sorted, {0, static_cast<std::uint32_t>(sorted.size()), 0, 0, 0},
                [&](Range first, std::uint8_t a) {
                  for_each_byte(tokens, sorted, first, [&](Range second, std::uint8_t b) {
                    second.place = static_cast<std::uint32_t>(a) << 8 | b;
                    if (tokens[sorted[second.begin]].size() == 2) {
                      starts_[second.place].token = sorted[second.begin++];
                    }
                    if (second.begin < second.end) ranges.push(second);
                  });
                });
  Plot plot;
  std::vector<std::pair<Range, std::uint8_t>> children;
  std::vector<std::uint8_t> bytes;
  while (!ranges.empty()) {
    const Range node = ranges.top();
    ranges.pop();
    children.clear();
    bytes.clear();
    for_each_byte(tokens, sorted, node, [&](Range child, std::uint8_t byte) {
      children.emplace_back(child, byte);
      bytes.push_back(byte);
    });
    const std::uint32_t base = plot.claim(bytes);
    if (base > kMaxBase) return cells_.clear();  // not usable
    if (node.depth == 2) {
      starts_[node.place].base = base;
    } else {
      cells_[node.place].link |= base << 9;
    }
    if (cells_.size() < base + 256) cells_.resize(base + 256);
    for (auto& [child, byte] : children) {
      child.place = base + byte;
      Cell& cell = cells_[child.place];
      cell.link = byte + 1u;
      if (tokens[sorted[child.begin]].size() == child.depth) cell.token = sorted[child.begin++];
      if (child.begin < child.end) ranges.push(child);
    }
  }
}

inline LongestFirst::Match LongestFirst::longest(const std::uint8_t* p,
                                                 const std::uint8_t* end) const {
  Match found{byte_id_[*p], 1};
  if (end - p == 1) return found;
  const Start& start = starts_[static_cast<std::size_t>(p[0]) << 8 | p[1]];
  if (start.token != kNone) found = {start.token, 2};
  std::uint32_t base = start.base;
  const std::uint8_t* const begin = p;
  for (p += 2; base != 0 && p < end; ++p) {
    const Cell& cell = cells_[base + *p];
    if ((cell.link & 511) != *p + 1u) break;
    if (cell.token != kNone) found = {cell.token, static_cast<std::uint32_t>(p + 1 - begin)};
    base = cell.link >> 9;
  }
  return found;
}

std::size_t LongestFirst::encode(const std::uint8_t* p, std::size_t length,
                                 std::uint32_t* out) const {
  // Places from which the rest of the piece cannot be encoded.
  constexpr std::size_t kWords = 8;
  std::uint64_t few[kWords];
  std::vector<std::uint64_t> many;
  std::uint64_t* dead = few;
  const std::size_t words = length / 64 + 1;
  if (words <= kWords) {
    std::memset(few, 0, words * sizeof *few);
  } else {
    many.resize(words);
    dead = many.data();
  }
  std::size_t count = 0;
  std::size_t at = 0;
  Match match = longest(p, p + length);
  while (true) {
    const std::size_t next = at + match.length;
    if (!(dead[next / 64] >> (next % 64) & 1) &&
        (count == 0 || may_stand(out[count - 1], match.token, kNever))) {
      out[count++] = match.token;
      at = next;
      if (at == length) return count;
      match = longest(p + at, p + length);
      continue;
    }
    match.token = shorter_[match.token];
    while (match.token == kNone) {
      dead[at / 64] |= std::uint64_t{1} << (at % 64);
      const std::uint32_t last = out[--count];
      at -= length_[last];
      match.token = shorter_[last];
    }
    match.length = length_[match.token];
  }
}

}  // namespace fastgpt
