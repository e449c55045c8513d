// Pieces cut by the caller, BPE dropout, training options and ranks as merges, against naive
// implementations; for sanitizer builds. Usage: fuzz_options SEED SECONDS. Prints the number of
// rounds; aborts on the first difference.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fuzzing.h"
#include "rank_merges.h"
#include "span_encoder.h"
#include "trainer.h"

using namespace fastgpt;

namespace {

using Ids = std::vector<std::uint32_t>;

std::string random_bytes(std::size_t most) {
  std::string text(below(most + 1), 'a');
  for (char& c : text) c = below(30) ? "abc"[below(3)] : static_cast<char>(below(256));
  return text;
}

// Rising places that end with the size; some pieces are empty.
std::vector<std::int64_t> random_ends(std::size_t size) {
  std::vector<std::int64_t> ends(below(8));
  for (auto& end : ends) end = static_cast<std::int64_t>(below(size + 1));
  ends.push_back(static_cast<std::int64_t>(size));
  std::sort(ends.begin(), ends.end());
  return ends;
}

Ids merge_all(const Ids& ids, std::uint32_t left, std::uint32_t right, std::uint32_t id) {
  Ids out;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const bool pair = i + 1 < ids.size() && ids[i] == left && ids[i + 1] == right;
    out.push_back(pair ? id : ids[i]);
    i += pair;
  }
  return out;
}

Ids bytes_as_ids(std::string_view piece) {
  Ids ids;
  for (const char c : piece) ids.push_back(gpt2_byte_ids()[static_cast<std::uint8_t>(c)]);
  return ids;
}

// Merges of the most frequent pair, smaller pair first, that respect the options.
std::vector<IdPair> train_naively(std::map<std::string, std::uint64_t> counts,
                                  const TrainOptions& options) {
  std::vector<std::pair<Ids, std::uint64_t>> words;
  for (const auto& [word, count] : counts) words.emplace_back(bytes_as_ids(word), count);
  std::vector<std::size_t> lengths(256, 1);
  std::vector<IdPair> out;
  while (out.size() < options.merges) {
    std::map<IdPair, std::uint64_t> pairs;
    for (const auto& [ids, count] : words) {
      for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
        const std::size_t length = lengths[ids[i]] + lengths[ids[i + 1]];
        if (options.max_length && length > options.max_length) continue;
        pairs[{ids[i], ids[i + 1]}] += count;
      }
    }
    IdPair best;
    if (out.size() < options.first.size()) {
      best = options.first[out.size()];
    } else {
      const auto found = std::max_element(pairs.begin(), pairs.end(),
                                          [](auto& a, auto& b) { return a.second < b.second; });
      if (found == pairs.end() || found->second < options.min_count) break;
      best = found->first;
    }
    const auto id = static_cast<std::uint32_t>(256 + out.size());
    lengths.push_back(lengths[best.first] + lengths[best.second]);
    out.push_back(best);
    for (auto& [ids, count] : words) ids = merge_all(ids, best.first, best.second, id);
  }
  return out;
}

std::vector<IdPair> check_training() {
  WordCounter counter(Pattern::kGpt2, 1);
  std::map<std::string, std::uint64_t> counts;
  for (std::size_t i = below(30); i > 0; --i) {
    const std::string text = random_bytes(40);
    const auto ends = random_ends(text.size());
    counter.add_pieces(text, ends.data(), ends.size());
    std::int64_t begin = 0;
    for (const std::int64_t end : ends) {
      if (end > begin) ++counts[text.substr(begin, end - begin)];
      begin = end;
    }
  }
  TrainOptions options;
  options.merges = below(60);
  options.min_count = 1 + below(4);
  options.max_length = below(2) ? 0 : 1 + below(9);
  for (std::size_t i = below(4); i > 0; --i) {
    const std::size_t ids = 256 + options.first.size();
    const auto any = [&] {
      const std::size_t id = below(3) && ids > 256 ? 256 + below(ids - 256) : below(ids);
      return static_cast<std::uint32_t>(
          below(2) ? gpt2_byte_ids()[static_cast<std::size_t>("abc"[below(3)])] : id);
    };
    const IdPair pair = {any(), any()};
    if (std::find(options.first.begin(), options.first.end(), pair) == options.first.end()) {
      options.first.push_back(pair);
    }
  }
  const auto pairs = train_bpe(counter.take(), options);
  require(pairs == train_naively(counts, options), "merges");
  return pairs;
}

Ids encode_naively(const Vocabulary& vocabulary, std::string_view piece, Dropout& dropout) {
  Ids ids = bytes_as_ids(piece);
  while (true) {
    std::vector<std::pair<std::size_t, std::size_t>> candidates;  // rank, place
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      for (std::size_t rank = vocabulary.merges.size(); rank-- > 0;) {
        const Merge& merge = vocabulary.merges[rank];
        if (merge.left != ids[i] || merge.right != ids[i + 1]) continue;
        candidates.emplace_back(rank, i);
        break;
      }
    }
    std::sort(candidates.begin(), candidates.end());
    const auto kept = std::find_if(candidates.begin(), candidates.end(),
                                   [&](auto&) { return !dropout.is_on() || !dropout.draw(); });
    if (kept == candidates.end()) return ids;
    const auto at = static_cast<std::ptrdiff_t>(kept->second);
    ids[kept->second] = vocabulary.merges[kept->first].id;
    ids.erase(ids.begin() + at + 1);
  }
}

void check_spans(const Vocabulary& vocabulary) {
  const SpanEncoder encoder(vocabulary);
  for (int i = 0; i < 10; ++i) {
    const std::string text = random_bytes(60);
    const auto ends = random_ends(text.size());
    const double p = below(2) ? 0 : static_cast<double>(below(11)) / 10;
    const std::uint64_t seed = rng();
    Dropout one(p, seed);
    Dropout other(p, seed);
    TokenBuffer buffer;
    encoder.encode(text, ends.data(), ends.size(), one, buffer);
    Ids expected;
    std::int64_t begin = 0;
    for (const std::int64_t end : ends) {
      const auto piece = std::string_view(text).substr(begin, end - begin);
      const Ids ids = encode_naively(vocabulary, piece, other);
      expected.insert(expected.end(), ids.begin(), ids.end());
      begin = end;
    }
    require(Ids(buffer.data(), buffer.data() + buffer.size()) == expected, "ids of pieces");
    std::vector<std::int64_t> wrong = ends;
    wrong[below(wrong.size())] = static_cast<std::int64_t>(rng());
    try {
      TokenBuffer unused;
      encoder.encode(text, wrong.data(), wrong.size(), one, unused);
    } catch (const std::invalid_argument&) {
    }
  }
}

// Ranks of a trained vocabulary are its merges again; arbitrary ones give merges that fit.
void check_ranks(const Vocabulary& vocabulary) {
  std::vector<std::string> tokens = vocabulary.tokens;
  std::sort(tokens.begin(), tokens.end());
  const bool distinct = std::adjacent_find(tokens.begin(), tokens.end()) == tokens.end();
  std::vector<std::string_view> views(vocabulary.tokens.begin(), vocabulary.tokens.end());
  const RankMerges again = merges_of_ranks(views);
  if (distinct && !again.has_unreachable) {
    require(again.merges.size() == vocabulary.merges.size(), "as many merges as tokens");
  }
  std::vector<std::string> strings;
  for (std::size_t i = below(60); i > 0; --i) strings.push_back(random_bytes(12));
  const std::vector<std::string_view> others(strings.begin(), strings.end());
  for (const Merge& merge : merges_of_ranks(others).merges) {
    require(strings[merge.left] + strings[merge.right] == strings[merge.id], "a merge fits");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return fuzz(argc, argv, 1, [] {
    const Vocabulary vocabulary = trained_vocabulary(check_training(), Pattern::kGpt2);
    check_spans(vocabulary);
    check_ranks(vocabulary);
  });
}
