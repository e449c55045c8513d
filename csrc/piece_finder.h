// Cuts text into pieces many at a time, with the widest vector instructions of the machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "pretokenizer.h"

namespace fastgpt {

// Writes the ends of the first pieces of [p, end) to `ends` and returns how many: at least one, at
// most kMaxFound. p is the beginning of a piece, end that of the text. Needs p < end.
inline constexpr std::size_t kMaxFound = 128;
using PieceFinder = std::size_t (*)(const std::uint8_t* p, const std::uint8_t* end,
                                    const std::uint8_t** ends);

// By pattern. All levels find the same pieces.
struct PieceFinders {
  PieceFinder of[4];
};
extern const PieceFinders kScalarFinders;
#if defined(__GNUC__) && defined(__x86_64__)
extern const PieceFinders kAvx2Finders;
extern const PieceFinders kAvx512Finders;
#elif defined(__GNUC__) && defined(__aarch64__)
extern const PieceFinders kNeonFinders;
#endif

// The levels that this machine has, "scalar" first and the one chosen by default last.
std::vector<std::string> simd_levels();
// The level in use; the variable FASTGPT_SIMD of the environment may name it.
std::string simd_level();
// Throws std::invalid_argument for a level that this machine has not.
void set_simd_level(const std::string& name);

PieceFinder piece_finder(Pattern pattern);

// Calls f(begin, length) for each piece of [p, end).
template <class F>
void for_each_piece(Pattern pattern, const std::uint8_t* p, const std::uint8_t* end, F&& f) {
  const PieceFinder find = piece_finder(pattern);
  const std::uint8_t* ends[kMaxFound];
  while (p < end) {
    const std::size_t found = find(p, end, ends);
    for (std::size_t i = 0; i < found; ++i) {
      f(p, static_cast<std::size_t>(ends[i] - p));
      p = ends[i];
    }
  }
}

}  // namespace fastgpt
