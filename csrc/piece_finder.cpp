#include "piece_finder.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace fastgpt {
namespace {

template <Pattern kPattern>
std::size_t find_scalar(const std::uint8_t* p, const std::uint8_t* end, const std::uint8_t** ends) {
  std::size_t found = 0;
  while (p < end && found < kMaxFound) ends[found++] = p = next_piece<kPattern>(p, end);
  return found;
}

using Level = std::pair<std::string, const PieceFinders*>;

std::vector<Level> make_levels() {
  std::vector<Level> levels{{"scalar", &kScalarFinders}};
#if defined(__GNUC__) && defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
    levels.emplace_back("avx2", &kAvx2Finders);
    if (__builtin_cpu_supports("avx512bw")) levels.emplace_back("avx512", &kAvx512Finders);
  }
#elif defined(__GNUC__) && defined(__aarch64__)
  levels.emplace_back("neon", &kNeonFinders);
#endif
  return levels;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> all = make_levels();
  return all;
}

const Level& find_level(const std::string& name) {
  std::string known;
  for (const Level& level : levels()) {
    if (level.first == name) return level;
    known += (known.empty() ? "" : ", ") + level.first;
  }
  throw std::invalid_argument("no SIMD level '" + name + "' here; use " + known);
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> level{[] {
    const char* const name = std::getenv("FASTGPT_SIMD");
    return name && *name ? &find_level(name) : &levels().back();
  }()};
  return level;
}

}  // namespace

const PieceFinders kScalarFinders{{find_scalar<Pattern::kGpt2>, find_scalar<Pattern::kGpt4>,
                                   find_scalar<Pattern::kLlama3>, find_scalar<Pattern::kO200k>}};

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.first);
  return names;
}

std::string simd_level() { return current().load()->first; }

void set_simd_level(const std::string& name) { current().store(&find_level(name)); }

PieceFinder piece_finder(Pattern pattern) {
  return current().load(std::memory_order_relaxed)->second->of[static_cast<int>(pattern)];
}

}  // namespace fastgpt
