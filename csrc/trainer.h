// Training of byte-level BPE from word counts.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "word_counter.h"

namespace fastgpt {

// Ids of the 256 bytes in GPT-2's order: printable ones of Latin-1 first. It is the order of the
// published vocabularies and of a Hugging Face ByteLevel alphabet, so ties break the same way.
const std::uint32_t* gpt2_byte_ids();

struct TrainOptions {
  std::size_t merges = 0;       // how many at most
  std::uint64_t min_count = 1;  // a pair seen less often is not merged
  std::size_t max_length = 0;   // bytes of a token that is merged, 0 is any number
  // Merged before all others, as if they were the most frequent; merge i of them makes id 256 + i.
  // They count as merges; min_count and max_length do not apply to them.
  std::vector<std::pair<std::uint32_t, std::uint32_t>> first;
  // Called now and then with (merges so far, merges wanted); may throw to stop the training.
  std::function<void(std::size_t, std::size_t)> progress;
};

using IdPair = std::pair<std::uint32_t, std::uint32_t>;

// The merges in order; merge i makes id 256 + i. Each one is the most frequent pair of neighbours
// within words, of equally frequent ones the pair of smaller ids. Fewer than wanted if the words
// are used up. Throws std::invalid_argument if distinct words have more than 4 GiB together.
std::vector<IdPair> train_bpe(WordMap words, const TrainOptions& options);

}  // namespace fastgpt
