// Random training, encoding and decoding against naive implementations; for sanitizer builds.
// Usage: fuzz_core SEED SECONDS. Prints the number of rounds; aborts on the first difference.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "encoder.h"
#include "fuzzing.h"
#include "piece_finder.h"
#include "trainer.h"
#include "utf8.h"

using namespace fastgpt;

namespace {

std::string random_bytes(std::size_t most) {
  static const char* const kParts[] = {
      "a",        "b",           "ab",           " ", "'s", "\n", "\r\n", "1",   "'",
      "\t",       "\xC3\xA9",    "\xE4\xB8\xAD", "!", "  ", "LL", "'ll",  "the", "\xF0\x9F\x98\x80",
      "\xC5\xBF", "\xE3\x80\x80"};
  std::string text;
  const std::size_t length = below(most + 1);
  while (text.size() < length) {
    const std::size_t kind = below(20);
    if (kind == 0) {
      text += static_cast<char>(below(256));
    } else if (kind == 1) {
      text += std::string(below(70), kParts[below(20)][0]);
    } else {
      text += kParts[below(20)];
    }
  }
  return text;
}

std::vector<std::string> pieces(Pattern pattern, const std::string& text) {
  std::vector<std::string> out;
  const auto* p = reinterpret_cast<const std::uint8_t*>(text.data());
  const auto* const end = p + text.size();
  while (p < end) {
    const auto* next = with_pattern(
        pattern, [&](auto which) { return next_piece<decltype(which)::value>(p, end); });
    require(next > p && next <= end, "a piece has at least one byte and ends within the text");
    out.emplace_back(p, next);
    p = next;
  }
  return out;
}

// Every SIMD level must find what the scanners find one by one.
void check_levels(Pattern pattern, const std::string& text) {
  const auto* const begin = reinterpret_cast<const std::uint8_t*>(text.data());
  const std::vector<std::string> wanted = pieces(pattern, text);
  for (const std::string& level : simd_levels()) {
    set_simd_level(level);
    std::vector<std::string> found;
    for_each_piece(pattern, begin, begin + text.size(),
                   [&](const std::uint8_t* piece, std::size_t length) {
                     found.emplace_back(piece, piece + length);
                   });
    require(found == wanted, level.c_str());
  }
  set_simd_level(simd_levels()[below(simd_levels().size())]);  // for what comes next
}

using Ids = std::vector<std::uint32_t>;

Ids merge_all(const Ids& ids, std::uint32_t left, std::uint32_t right, std::uint32_t id) {
  Ids out;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i + 1 < ids.size() && ids[i] == left && ids[i + 1] == right) {
      out.push_back(id);
      ++i;
    } else {
      out.push_back(ids[i]);
    }
  }
  return out;
}

Ids bytes_as_ids(const std::string& piece) {
  Ids ids;
  for (const char c : piece) ids.push_back(gpt2_byte_ids()[static_cast<std::uint8_t>(c)]);
  return ids;
}

std::vector<IdPair> train_naively(Pattern pattern, const std::vector<std::string>& texts,
                                  std::size_t merges) {
  std::map<std::string, std::uint64_t> counts;
  for (const auto& text : texts) {
    for (const auto& piece : pieces(pattern, text)) ++counts[piece];
  }
  std::vector<std::pair<Ids, std::uint64_t>> words;
  for (const auto& [word, count] : counts) words.emplace_back(bytes_as_ids(word), count);
  std::vector<IdPair> out;
  while (out.size() < merges) {
    std::map<IdPair, std::uint64_t> pairs;  // sorted: the first maximum is the smallest pair
    for (const auto& [ids, count] : words) {
      for (std::size_t i = 0; i + 1 < ids.size(); ++i) pairs[{ids[i], ids[i + 1]}] += count;
    }
    if (pairs.empty()) break;
    const auto best = std::max_element(pairs.begin(), pairs.end(),
                                       [](auto& a, auto& b) { return a.second < b.second; });
    const auto id = static_cast<std::uint32_t>(256 + out.size());
    out.push_back(best->first);
    for (auto& [ids, count] : words) ids = merge_all(ids, out.back().first, out.back().second, id);
  }
  return out;
}

Ids encode_naively(Pattern pattern, const std::vector<Merge>& merges, const std::string& text) {
  Ids out;
  for (const auto& piece : pieces(pattern, text)) {
    Ids ids = bytes_as_ids(piece);
    for (const Merge& merge : merges) ids = merge_all(ids, merge.left, merge.right, merge.id);
    out.insert(out.end(), ids.begin(), ids.end());
  }
  return out;
}

Vocabulary make_vocabulary(Pattern pattern, const std::vector<IdPair>& pairs) {
  Vocabulary vocabulary = trained_vocabulary(pairs, pattern);
  const auto next = static_cast<std::uint32_t>(vocabulary.tokens.size());
  vocabulary.specials = {{"<s>", next}, {"<s><s>", next + 1}, {"a", next + 5}};
  vocabulary.whole_pieces = below(2) == 0;
  return vocabulary;
}

std::string decode(const Encoder& encoder, const std::uint32_t* ids, std::size_t count) {
  ByteBuffer out;
  encoder.decode(ids, count, out);
  return {out.data(), out.size()};
}

void check_encoder(const Encoder& encoder, Pattern pattern) {
  for (int i = 0; i < 12; ++i) {
    const std::string text = random_bytes(i < 2 ? 3000 : 60);
    const auto state = encoder.acquire();
    TokenBuffer buffer;
    encoder.encode(text, *state, buffer);
    const Ids ids(buffer.data(), buffer.data() + buffer.size());
    require(ids == encode_naively(pattern, encoder.vocabulary().merges, text), "ids");
    require(decode(encoder, ids.data(), ids.size()) == text, "round trip");
    TokenBuffer special;
    encoder.encode_with_specials(text + "<s><s><s>" + text, {0, 1, 2}, *state, special);
    require(decode(encoder, special.data(), special.size()) == text + "<s><s><s>" + text,
            "round trip with special tokens");
  }
  for (int i = 0; i < 20; ++i) {
    const auto id = static_cast<std::int64_t>(rng() >> below(64));
    try {
      ByteBuffer unused;
      encoder.decode(&id, 1, unused);
      require(static_cast<std::size_t>(id) < encoder.vocab_size(), "an id that exists");
    } catch (const std::invalid_argument&) {
    }
  }
}

// A damaged vocabulary is refused, or works.
void check_damaged(Vocabulary vocabulary) {
  for (std::size_t i = 0; i <= below(3); ++i) {
    const auto anywhere = static_cast<std::uint32_t>(rng() >> (32 + below(32)));
    if (!vocabulary.merges.empty()) {
      Merge& merge = vocabulary.merges[below(vocabulary.merges.size())];
      (below(2) ? merge.left : below(2) ? merge.right : merge.id) = anywhere;
    }
    if (below(3) == 0) vocabulary.tokens[below(vocabulary.tokens.size())] = random_bytes(3);
    if (below(3) == 0) vocabulary.tokens.resize(below(vocabulary.tokens.size()) + 1);
    if (below(3) == 0) vocabulary.specials.emplace_back(random_bytes(3), anywhere);
  }
  try {
    const Encoder encoder(std::move(vocabulary));
    const std::string text = random_bytes(100);
    TokenBuffer ids;
    encoder.encode(text, *encoder.acquire(), ids);
    require(decode(encoder, ids.data(), ids.size()) == text,
            "round trip of a damaged but accepted vocabulary");
  } catch (const std::invalid_argument&) {
  }
}

// The lowest rank first, of equal ones the leftmost, one merge at a time.
Ids merge_one_by_one(Ids ids, const MergeTable& table) {
  while (true) {
    std::uint32_t best = MergeTable::kNone;
    std::size_t at = 0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      const std::uint32_t rank = table.rank(ids[i], ids[i + 1]);
      if (rank < best) {
        best = rank;
        at = i;
      }
    }
    if (best == MergeTable::kNone) return ids;
    ids[at] = table.id(best);
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

// Merges that no trainer would make, over so few letters that all tokens overlap.
void check_longest_first() {
  std::vector<std::string> tokens(256);
  for (int byte = 0; byte < 256; ++byte) {
    tokens[gpt2_byte_ids()[byte]] = std::string(1, static_cast<char>(byte));
  }
  Ids known;
  const std::size_t letters = 1 + below(4);
  for (std::size_t i = 0; i < letters; ++i) known.push_back(gpt2_byte_ids()['a' + i]);
  std::vector<Merge> merges;
  for (std::size_t i = below(60); i > 0; --i) {
    const std::uint32_t left = known[below(known.size())];
    const std::uint32_t right = known[below(known.size())];
    if (tokens[left].size() + tokens[right].size() > 20) continue;
    const std::string token = tokens[left] + tokens[right];
    const auto found = std::find(tokens.begin(), tokens.end(), token);
    const auto id = static_cast<std::uint32_t>(found - tokens.begin());
    if (found == tokens.end()) {
      known.push_back(id);
      tokens.push_back(token);
    }
    merges.push_back({left, right, id});
  }
  if (!merges.empty() && below(4) == 0) {
    std::swap(merges[below(merges.size())], merges[below(merges.size())]);
  }
  const MergeTable table(merges);
  const LongestFirst longest_first(tokens, merges, table, gpt2_byte_ids());
  if (!longest_first.usable()) return;
  for (int i = 0; i < 30; ++i) {
    std::string piece(2 + below(below(8) ? 30 : 1200), 'a');
    for (char& c : piece) c = static_cast<char>('a' + below(letters));
    Ids ids(piece.size());
    ids.resize(longest_first.encode(reinterpret_cast<const std::uint8_t*>(piece.data()),
                                    piece.size(), ids.data()));
    require(ids == merge_one_by_one(bytes_as_ids(piece), table), "ids, the longest first");
  }
}

// Characters of one width as UTF-8: what the scanners read back, one by one.
template <class Char>
void check_utf8() {
  std::vector<Char> text(below(40));
  std::string wanted;
  bool valid = true;
  const std::size_t rare = 1 + below(20);
  for (Char& c : text) {
    const std::uint32_t most = sizeof(Char) == 1 ? 0xFF : sizeof(Char) == 2 ? 0xFFFF : 0x10FFFF;
    const std::uint32_t point = below(rare) ? below(128) : below(std::size_t{most} + 1);
    c = static_cast<Char>(point);
    valid = valid && (point < 0xD800 || point > 0xDFFF);
    const int length = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    const std::uint32_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    wanted += static_cast<char>(lead[length] | point >> 6 * (length - 1));
    for (int i = length - 2; i >= 0; --i) {
      wanted += static_cast<char>(0x80 | (point >> 6 * i & 0x3F));
    }
  }
  ByteBuffer out;
  require(append_utf8(text.data(), text.size(), out) == valid, "lone surrogates are seen");
  if (valid) require(std::string(out.data(), out.size()) == wanted, "UTF-8");
}

void one_round() {
  for (int i = 0; i < 20; ++i) {
    check_utf8<std::uint8_t>();
    check_utf8<std::uint16_t>();
    check_utf8<std::uint32_t>();
  }
  for (int i = 0; i < 20; ++i) check_longest_first();
  const auto pattern = static_cast<Pattern>(below(4));
  for (int i = 0; i < 20; ++i) check_levels(pattern, random_bytes(400));
  std::vector<std::string> texts(below(12));
  for (auto& text : texts) text = random_bytes(200);
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  WordCounter counter(pattern, static_cast<int>(below(3)) + 1);
  counter.add(views);
  TrainOptions options;
  options.merges = below(150);
  const auto pairs = train_bpe(counter.take(), options);
  require(pairs == train_naively(pattern, texts, options.merges), "merges");
  const Vocabulary vocabulary = make_vocabulary(pattern, pairs);
  check_encoder(Encoder(vocabulary), pattern);
  check_damaged(vocabulary);
}

}  // namespace

int main(int argc, char** argv) { return fuzz(argc, argv, 1, one_round); }
