#include "rank_merges.h"

#include <algorithm>
#include <unordered_map>

namespace fastgpt {
namespace {

constexpr std::uint32_t kNever = 0xFFFFFFFF;

class Ranks {
 public:
  explicit Ranks(const std::vector<std::string_view>& tokens) {
    rank_.reserve(tokens.size());
    for (std::uint32_t rank = 0; rank < tokens.size(); ++rank) {
      if (!tokens[rank].empty()) rank_.emplace(tokens[rank], rank);
    }
  }
  std::uint32_t of(std::string_view token) const {
    const auto found = rank_.find(token);
    return found == rank_.end() ? kNever : found->second;
  }

 private:
  std::unordered_map<std::string_view, std::uint32_t> rank_;
};

// What the token's own bytes merge to before the last step. As merges inside a token do not depend
// on what surrounds it, these are the only two parts it is ever made of; if more than two are left,
// merging never leads to it. `begins` receives where the parts begin, and the end.
void last_parts(std::string_view token, const Ranks& ranks, std::vector<std::uint32_t>& begins,
                std::vector<std::uint32_t>& pairs) {
  const auto length = static_cast<std::uint32_t>(token.size());
  begins.resize(length + 1);
  pairs.resize(length - 1);
  for (std::uint32_t i = 0; i <= length; ++i) begins[i] = i;
  const auto rank_at = [&](std::size_t i) {
    return ranks.of(token.substr(begins[i], begins[i + 2] - begins[i]));
  };
  for (std::size_t i = 0; i < pairs.size(); ++i) pairs[i] = rank_at(i);
  while (pairs.size() > 1) {
    const auto least = std::min_element(pairs.begin(), pairs.end());
    if (*least == kNever) return;
    const auto i = static_cast<std::size_t>(least - pairs.begin());
    begins.erase(begins.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    pairs.erase(least);
    if (i > 0) pairs[i - 1] = rank_at(i - 1);
    if (i < pairs.size()) pairs[i] = rank_at(i);
  }
}

}  // namespace

RankMerges merges_of_ranks(const std::vector<std::string_view>& tokens) {
  const Ranks ranks(tokens);
  RankMerges result;
  std::vector<std::uint32_t> begins;
  std::vector<std::uint32_t> pairs;
  for (std::uint32_t rank = 0; rank < tokens.size(); ++rank) {
    const std::string_view token = tokens[rank];
    if (token.size() < 2) continue;
    last_parts(token, ranks, begins, pairs);
    const std::uint32_t left = ranks.of(token.substr(0, begins[1]));
    const std::uint32_t right = ranks.of(token.substr(begins[1]));
    if (pairs.size() == 1 && left != kNever && right != kNever) {
      result.merges.push_back({left, right, rank});
    } else {
      result.has_unreachable = true;
    }
  }
  return result;
}

}  // namespace fastgpt
