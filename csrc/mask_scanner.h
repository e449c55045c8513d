// Finds where pieces start in 64 bytes at once: a bit per byte and class, and algebra on 64 bits.
//
// Included by one file per instruction set, behind a pragma that turns the instructions on; hence
// no includes here, and everything has internal linkage. Level::classify(p) gives the Masks of the
// 64 bytes at p. Only what those bytes alone decide is used; the scanners of pretokenizer.h do the
// rest: other characters than ASCII, pieces longer than the window, the end of the text.

namespace fastgpt {
namespace {

using Bits = std::uint64_t;

struct Masks {
  Bits letter;
  Bits upper;
  Bits digit;
  Bits white;
  Bits newline;
  Bits space;
  Bits apostrophe;
  Bits slash;
  Bits high;  // no ASCII
};

inline Bits run_starts(Bits run) { return run & ~(run << 1); }

// Piece i..i + n is cut out as a contraction.
inline Bits cut_out(Bits starts, int i, int n) {
  const Bits inside = ((Bits{1} << n) - 1) << i & ~(Bits{1} << i);
  return (starts & ~inside) | Bits{1} << (i + n);
}

// Starts of white pieces where newlines and what precedes them are one: \s*[\r\n]|\s+(?!\S)|\s
inline Bits white_starts(const Masks& m, Bits swallowed) {
  const Bits blank = m.white & ~m.newline;
  // Blanks behind the last newline of a run of white space start a piece.
  Bits behind = (m.newline & ~swallowed) << 1 & blank;
  if ((blank + behind) & ~blank & m.newline) {  // a newline follows: it was not the last
    for (Bits left = behind; left; left &= left - 1) {
      const int i = scan::count_trailing_zeros(left);
      const Bits rest = ~blank >> i;
      if (rest && m.newline >> (i + scan::count_trailing_zeros(rest)) & 1) {
        behind &= ~(Bits{1} << i);
      }
    }
  }
  return run_starts(m.white & ~swallowed) | behind | (blank & ~(m.white >> 1));
}

inline Bits digit_starts(Bits digit) {
  Bits all = run_starts(digit);
  for (Bits next = all; next;) {
    next = next << 3 & digit & digit << 1 & digit << 2 & digit << 3;
    all |= next;
  }
  return all;
}

inline Bits gpt2_starts(const std::uint8_t* p, const Masks& m, Bits other, Bits sure) {
  const Bits runs = run_starts(m.letter) | run_starts(m.digit) | run_starts(other);
  Bits starts = (runs & ~(m.space << 1)) | run_starts(m.white) | (m.white & ~(m.white >> 1));
  for (Bits left = m.apostrophe & starts & m.letter >> 1 & sure; left; left &= left - 1) {
    const int i = scan::count_trailing_zeros(left);
    if (const int n = scan::contraction<false>(p + i, p + 64)) starts = cut_out(starts, i, n);
  }
  return starts;
}

template <Pattern kPattern>
inline Bits gpt4_starts(const std::uint8_t* p, const Masks& m, Bits other, Bits swallowed,
                        Bits sure) {
  constexpr bool kCased = kPattern == Pattern::kO200k;
  const Bits symbols = run_starts(other) & ~(m.space << 1);
  const Bits before_words = symbols | (m.white & ~m.newline);  // one such belongs to the word
  Bits starts = symbols | white_starts(m, swallowed) | digit_starts(m.digit) |
                (run_starts(m.letter) & ~(before_words << 1));
  if (kCased) starts |= m.upper & (m.letter & ~m.upper) << 1;
  Bits left = m.apostrophe & m.letter >> 1 & sure & (kCased ? m.letter << 1 : starts);
  int last_end = -1;
  for (; left; left &= left - 1) {
    const int i = scan::count_trailing_zeros(left);
    if (i == last_end) continue;  // only one contraction belongs to a word
    const int n = scan::contraction<true>(p + i, p + 64);
    if (n == 0) continue;
    starts = cut_out(starts, i, n);
    if (kCased) {
      starts &= ~(Bits{1} << i);
      last_end = i + n;
    }
  }
  return starts;
}

// Bit i: a piece starts at p + i for sure, i > 0. A piece starts at p; 64 bytes are there.
template <Pattern kPattern, class Level>
inline Bits sure_starts(const std::uint8_t* p) {
  const Masks m = Level::classify(p);
  const int known = m.high ? scan::count_trailing_zeros(m.high) : 64;
  int limit = known - 4;  // a contraction at the limit is seen whole
  if (limit <= 0) return 0;
  const Bits below = ~Bits{0} >> (64 - known);
  if (m.white >> (known - 1) & 1) {  // white space is cut by what follows all of it
    const Bits solid = ~m.white & below;
    const int run = solid ? 64 - __builtin_clzll(solid) : 0;
    if (run < limit) limit = run;
  }
  const Bits other = ~(m.letter | m.digit | m.white | m.high);
  Bits swallowed = 0;  // newlines behind symbols
  if (kPattern != Pattern::kGpt2) {
    swallowed = m.newline & ~(m.newline + (other << 1 & m.newline));
    if (kPattern == Pattern::kO200k) {
      if (const Bits slashes = swallowed << 1 & m.slash) {
        const int before = scan::count_trailing_zeros(slashes) - 1;
        if (before < limit) limit = before;
      }
    }
  }
  const Bits sure = (Bits{2} << limit) - 1;
  if constexpr (kPattern == Pattern::kGpt2) {
    return gpt2_starts(p, m, other, sure) & sure & ~Bits{1};
  } else {
    return gpt4_starts<kPattern>(p, m, other, swallowed, sure) & sure & ~Bits{1};
  }
}

template <Pattern kPattern, class Level>
std::size_t find_masked(const std::uint8_t* p, const std::uint8_t* end, const std::uint8_t** ends) {
  constexpr int kScalarPieces = 4;  // before the next window where one was of no use
  std::size_t found = 0;
  while (p < end && found <= kMaxFound - 64) {
    if (end - p >= 64) {
      const std::uint8_t* const window = p;
      for (Bits starts = sure_starts<kPattern, Level>(p); starts; starts &= starts - 1) {
        ends[found++] = p = window + scan::count_trailing_zeros(starts);
      }
      if (p != window) continue;
    }
    for (int i = 0; i < kScalarPieces && p < end; ++i) {
      ends[found++] = p = next_piece<kPattern>(p, end);
    }
  }
  return found;
}

template <class Level>
constexpr PieceFinders masked_finders() {
  return {{find_masked<Pattern::kGpt2, Level>, find_masked<Pattern::kGpt4, Level>,
           find_masked<Pattern::kLlama3, Level>, find_masked<Pattern::kO200k, Level>}};
}

}  // namespace
}  // namespace fastgpt
