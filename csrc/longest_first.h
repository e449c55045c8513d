// BPE of one piece without merging: the longest tokens that can stand beside each other.
//
// What merging makes of a text is the only sequence of tokens in which each token is what its own
// bytes merge to, and so are each two neighbours (the "bpe" crate of github/rust-gems, 2023). So
// the longest token is tried first at each place, a shorter one where it cannot follow the token
// before, and another token before where none can: in practice a step or two a token instead of one
// a byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "merge_table.h"

namespace fastgpt {

class LongestFirst {
 public:
  // table is made of merges; byte_id has 256 ids.
  LongestFirst(const std::vector<std::string>& tokens, const std::vector<Merge>& merges,
               const MergeTable& table, const std::uint32_t* byte_id);

  // False for vocabularies with a merge that comes before the merges of its parts: there, the order
  // of merges does not follow from their ranks alone.
  bool usable() const { return !cells_.empty(); }

  // Writes the ids of the piece and returns their number; out has room for length, which is not 0.
  // In linear time: no place is left more often than tokens begin there.
  std::size_t encode(const std::uint8_t* p, std::size_t length, std::uint32_t* out) const;

 private:
  static constexpr std::uint32_t kNever = 0xFFFFFFFF;
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;  // no token

  struct Token {
    std::uint32_t time = kNever;  // 0: a byte; else the rank of its last merge, plus one
    std::uint32_t left = kNone;   // the parts of that merge
    std::uint32_t right = kNone;
    std::uint32_t followers = 0;  // a bit for each token that it merges with, by bit_of
  };
  // The tree of all tokens as a double array (Aoe 1989): the child of a node for a byte is at
  // base + byte, if that cell has the byte. No two nodes have the same base.
  struct Cell {
    std::uint32_t link = 0;  // base << 9 | byte + 1; base 0: no child, link 0: no node
    std::uint32_t token = kNone;
  };
  // Where the tree is entered: by two bytes at once.
  struct Start {
    std::uint32_t base = 0;
    std::uint32_t token = kNone;
  };
  struct Match {
    std::uint32_t token;
    std::uint32_t length;
  };

  bool derive(const std::vector<Merge>& merges);
  bool may_stand(std::uint32_t first, std::uint32_t second, std::uint32_t limit) const;
  void plant(const std::vector<std::string>& tokens);
  Match longest(const std::uint8_t* p, const std::uint8_t* end) const;

  static std::uint32_t bit_of(std::uint32_t id) { return 1u << (id * 0x9E3779B1u >> 27); }

  const MergeTable& table_;
  std::uint32_t byte_id_[256];
  std::vector<Token> tokens_;
  std::vector<std::uint32_t> length_;   // of each token, in bytes
  std::vector<std::uint32_t> shorter_;  // for each token the longest one that it begins with
  std::vector<Start> starts_;           // by first byte << 8 | second
  std::vector<Cell> cells_;
};

}  // namespace fastgpt
