// The merges behind a list of tokens by rank, which is all that a .tiktoken file says.
#pragma once

#include <string_view>
#include <vector>

#include "merge_table.h"

namespace fastgpt {

struct RankMerges {
  std::vector<Merge> merges;  // by rank of the token they make
  // Some token is never made by merging: tiktoken gives it to whole pieces only.
  bool has_unreachable = false;
};

// tokens by rank; an empty one is a rank that nothing has. Takes time with the square of the length
// of a token, so bound it before.
RankMerges merges_of_ranks(const std::vector<std::string_view>& tokens);

}  // namespace fastgpt
