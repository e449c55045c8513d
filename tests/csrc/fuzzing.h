// What the fuzz programs share: one stream of random numbers, checks, and the loop against time.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "encoder.h"
#include "trainer.h"

inline std::mt19937_64 rng;

inline std::size_t below(std::size_t n) { return static_cast<std::size_t>(rng() % n); }

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

// What training makes of these pairs: the bytes first, then a token for each merge.
inline fastgpt::Vocabulary trained_vocabulary(const std::vector<fastgpt::IdPair>& pairs,
                                              fastgpt::Pattern pattern) {
  fastgpt::Vocabulary vocabulary;
  vocabulary.pattern = pattern;
  vocabulary.tokens.resize(256);
  for (int byte = 0; byte < 256; ++byte) {
    vocabulary.tokens[fastgpt::gpt2_byte_ids()[byte]] = std::string(1, static_cast<char>(byte));
  }
  for (const auto& [left, right] : pairs) {
    vocabulary.merges.push_back(
        {left, right, static_cast<std::uint32_t>(vocabulary.tokens.size())});
    vocabulary.tokens.push_back(vocabulary.tokens[left] + vocabulary.tokens[right]);
  }
  return vocabulary;
}

// main() of a program with the arguments SEED SECONDS: rounds until the time is over, at least so
// many, and how many there were.
template <class Round>
int fuzz(int argc, char** argv, long at_least, Round&& round) {
  if (argc != 3) return 2;
  rng.seed(std::strtoull(argv[1], nullptr, 10));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[2]));
  long rounds = 0;
  for (; rounds < at_least || std::chrono::steady_clock::now() < end; ++rounds) round();
  std::printf("%ld rounds\n", rounds);
  return 0;
}
