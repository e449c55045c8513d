// Encodes pieces that the caller has cut, for split patterns without a scanner, and BPE dropout.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "encoder.h"
#include "merge_table.h"
#include "token_buffer.h"

namespace fastgpt {

// BPE dropout (Provilkov et al. 2020, arXiv:1910.13267, algorithm 1): before each merge every
// candidate is left out with probability p, and the best of the rest is made. Equal seeds give
// equal ids on every machine.
class Dropout {
 public:
  // p in [0, 1]; 0 is no dropout, 1 leaves single bytes.
  Dropout(double p, std::uint64_t seed) : p_(p), state_(seed) {}

  bool is_on() const { return p_ > 0; }
  bool draw();

 private:
  double p_;
  std::uint64_t state_;
};

// Immutable; any number of threads may use one. Has no cache: the pieces of a regular expression
// are slower to find than to merge, and under dropout no two are alike.
class SpanEncoder {
 public:
  // A vocabulary that an Encoder accepted; it must outlive this.
  explicit SpanEncoder(const Vocabulary& vocabulary);

  // Appends the ids of text, cut before each of the `count` rising places `ends`, the last of which
  // is the size of the text. Throws std::invalid_argument for other places.
  void encode(std::string_view text, const std::int64_t* ends, std::size_t count, Dropout& dropout,
              TokenBuffer& out) const;

 private:
  struct Work;
  void encode_piece(std::string_view piece, Dropout& dropout, Work& work, TokenBuffer& out) const;

  MergeTable merges_;
  std::uint32_t byte_id_[256];
  std::unordered_map<std::string_view, std::uint32_t> whole_;  // empty unless whole_pieces
};

}  // namespace fastgpt
