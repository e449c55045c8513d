// Hand-written scanners for the split patterns of GPT-2, GPT-4 (cl100k), LLaMA-3 and o200k.
//
// Each returns exactly what the regular expression would match at p, for the whole text [p, end):
//   GPT-2    '(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s
//   GPT-4    '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+
//            | ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s
//   LLaMA-3  as GPT-4 without \s++$ (so white space that ends the text is cut after a newline)
//   o200k    [^\r\n\p{L}\p{N}]?U*L+C?|[^\r\n\p{L}\p{N}]?U+L*C?|\p{N}{1,3}
//            | ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
//            with U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], L = [\p{Ll}\p{Lm}\p{Lo}\p{M}]
//            and C = (?i:'s|'t|'re|'ve|'m|'ll|'d)
// Every byte belongs to exactly one piece, and each is looked at a bounded number of times.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "char_class.h"

namespace fastgpt {

enum class Pattern { kGpt2, kGpt4, kLlama3, kO200k };

namespace scan {

using Byte = const std::uint8_t;

inline int count_trailing_zeros(std::uint64_t word) {
#if defined(_MSC_VER)
  unsigned long index;
  _BitScanForward64(&index, word);
  return static_cast<int>(index);
#else
  return __builtin_ctzll(word);
#endif
}

inline bool is_white(CharClass cls) { return cls >= CharClass::kSpace; }

// Index of the first of the 8 bytes at p that is no ASCII letter, 8 if all are.
inline int ascii_letters(Byte* p) {
  constexpr std::uint64_t kOnes = 0x0101010101010101;
  std::uint64_t bytes;
  std::memcpy(&bytes, p, 8);
  const std::uint64_t low = (bytes | 0x20 * kOnes) & 0x7F * kOnes;
  const std::uint64_t from_a = low + (0x80 - 'a') * kOnes;      // top bit: at least 'a'
  const std::uint64_t over_z = low + (0x80 - 'z' - 1) * kOnes;  // top bit: over 'z'
  const std::uint64_t others = (~from_a | over_z | bytes) & 0x80 * kOnes;
  return others ? count_trailing_zeros(others) >> 3 : 8;
}

inline Byte* letters_end(Byte* p, Byte* end) {
  while (true) {
    while (end - p >= 8) {
      const int letters = ascii_letters(p);
      p += letters;
      if (letters < 8) break;
    }
    if (p == end) return p;
    // The last bytes of the text, or a character of another script and then mostly more of them.
    do {
      const CharInfo info = classify(p, end);
      if (info.cls != CharClass::kLetter) return p;
      p += info.length;
    } while (p < end && *p >= 0x80);
  }
}

// End of the run of characters of one class that starts at p.
inline Byte* run_end(Byte* p, Byte* end, CharClass cls) {
  if (cls == CharClass::kLetter) return letters_end(p, end);
  while (p < end) {
    if (*p < 0x80) {
      if (kCharTables.byte[*p] != cls) break;
      ++p;
    } else {
      const CharInfo info = classify_multibyte(p, end);
      if (info.cls != cls) break;
      p += info.length;
    }
  }
  return p;
}

inline std::uint8_t lower(std::uint8_t c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; }

// Length of the contraction at an apostrophe ('s 't 're ...), 0 if there is none.
template <bool kIgnoreCase>
inline int contraction(Byte* p, Byte* end) {
  if (end - p < 2) return 0;
  const std::uint8_t a = kIgnoreCase ? lower(p[1]) : p[1];
  if (a == 's' || a == 'd' || a == 'm' || a == 't') return 2;
  if (end - p < 3) return 0;
  // U+017F, the long s, is the one character outside ASCII that folds to a letter of the pattern.
  if (kIgnoreCase && p[1] == 0xC5 && p[2] == 0xBF) return 3;
  const std::uint8_t b = kIgnoreCase ? lower(p[2]) : p[2];
  const bool found = (a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e');
  return found ? 3 : 0;
}

// White space up to its last character if something else follows: \s++$|\s+(?!\S)|\s
// With newlines apart: \s*[\r\n] comes first, before \s++$ (LLaMA-3, o200k) or behind it (GPT-4).
template <Pattern kPattern>
inline Byte* white_end(Byte* p, Byte* end) {
  Byte* q = p;
  Byte* last = p;  // start of the last character of the run
  Byte* behind_newline = nullptr;
  while (q < end) {
    const CharInfo info = classify(q, end);
    if (!is_white(info.cls)) break;
    last = q;
    q += info.length;
    if (info.cls == CharClass::kNewline) behind_newline = q;
  }
  constexpr bool kEndFirst = kPattern == Pattern::kGpt2 || kPattern == Pattern::kGpt4;
  if (kEndFirst && q == end) return q;
  if (kPattern != Pattern::kGpt2 && behind_newline) return behind_newline;
  if (q == end || last == p) return q;
  return last;
}

inline Byte* gpt2(Byte* p, Byte* end) {
  if (*p == '\'') {
    if (const int n = contraction<false>(p, end)) return p + n;
  }
  const CharInfo info = classify(p, end);
  if (!is_white(info.cls)) return run_end(p + info.length, end, info.cls);
  if (*p == ' ' && end - p > 1) {
    const CharInfo next = classify(p + 1, end);
    if (!is_white(next.cls)) return run_end(p + 1 + next.length, end, next.cls);
  }
  return white_end<Pattern::kGpt2>(p, end);
}

template <Pattern kPattern>
inline Byte* symbols_end(Byte* p, Byte* end) {
  constexpr bool kSlash = kPattern == Pattern::kO200k;
  p = run_end(p, end, CharClass::kOther);
  while (p < end && (*p == '\r' || *p == '\n' || (kSlash && *p == '/'))) ++p;
  return p;
}

inline Byte* numbers_end(Byte* p, Byte* end) {
  for (int i = 0; i < 3 && p < end; ++i) {
    const CharInfo info = classify(p, end);
    if (info.cls != CharClass::kNumber) break;
    p += info.length;
  }
  return p;
}

template <Pattern kPattern>
inline Byte* gpt4(Byte* p, Byte* end) {
  if (*p == '\'') {
    if (const int n = contraction<true>(p, end)) return p + n;
  }
  const CharInfo info = classify(p, end);
  Byte* const q = p + info.length;
  if (info.cls == CharClass::kLetter) return run_end(q, end, CharClass::kLetter);
  if (info.cls == CharClass::kNumber) return numbers_end(p, end);
  if (info.cls != CharClass::kNewline && q < end) {
    // Any one character but a newline goes with the letters behind it, a blank with symbols too.
    const CharInfo next = classify(q, end);
    if (next.cls == CharClass::kLetter) return run_end(q + next.length, end, next.cls);
    if (*p == ' ' && next.cls == CharClass::kOther) return symbols_end<kPattern>(q, end);
  }
  if (info.cls == CharClass::kOther) return symbols_end<kPattern>(q, end);
  return white_end<kPattern>(p, end);
}

// End of U*L+|U+L* at p, or p if there is no match. Without `upper_alone` of U*L+ alone.
inline Byte* cased_letters_end(Byte* p, Byte* end, bool upper_alone) {
  Byte* q = p;
  Byte* behind_both = p;  // behind the last character of U* that is in L too
  while (q < end) {
    const CasedInfo info = classify_cased(q, end);
    if (!(info.cases & kUpper)) {
      if (!info.cases) break;
      do {  // U* has run into an L that it does not contain: L+ goes on from here
        q += classify_cased(q, end).length;
      } while (q < end && classify_cased(q, end).cases & kLower);
      return q;
    }
    q += info.length;
    if (info.cases & kLower) behind_both = q;
  }
  // U* gives back characters until L+ finds one, and that is then the last of the match.
  if (behind_both != p) return behind_both;
  return upper_alone ? q : p;
}

inline Byte* with_contraction(Byte* p, Byte* end) {
  return p < end && *p == '\'' ? p + contraction<true>(p, end) : p;
}

inline Byte* o200k(Byte* p, Byte* end) {
  const CasedInfo info = classify_cased(p, end);
  Byte* const q = p + info.length;
  if (info.cls == CharClass::kLetter) {
    return with_contraction(cased_letters_end(p, end, true), end);
  }
  if (info.cls == CharClass::kNumber) return numbers_end(p, end);
  if (info.cls != CharClass::kNewline) {
    // Any one character but a newline goes with the word behind it; a mark is a word by itself.
    const bool mark = info.cases != 0;
    Byte* const word = cased_letters_end(q, end, !mark);
    if (mark || word != q) return with_contraction(word, end);
    if (info.cls == CharClass::kOther) return symbols_end<Pattern::kO200k>(q, end);
    if (*p == ' ' && q < end && classify(q, end).cls == CharClass::kOther) {
      return symbols_end<Pattern::kO200k>(q, end);
    }
  }
  return white_end<Pattern::kO200k>(p, end);
}

}  // namespace scan

// End of the first piece of [p, end). Needs p < end.
template <Pattern kPattern>
inline const std::uint8_t* next_piece(const std::uint8_t* p, const std::uint8_t* end) {
  if constexpr (kPattern == Pattern::kGpt2) {
    return scan::gpt2(p, end);
  } else if constexpr (kPattern == Pattern::kO200k) {
    return scan::o200k(p, end);
  } else {
    return scan::gpt4<kPattern>(p, end);
  }
}

// Calls f with a std::integral_constant of the pattern, so that scanners are inlined.
template <class F>
decltype(auto) with_pattern(Pattern pattern, F&& f) {
  switch (pattern) {
    case Pattern::kGpt2:
      return f(std::integral_constant<Pattern, Pattern::kGpt2>{});
    case Pattern::kGpt4:
      return f(std::integral_constant<Pattern, Pattern::kGpt4>{});
    case Pattern::kLlama3:
      return f(std::integral_constant<Pattern, Pattern::kLlama3>{});
    default:
      return f(std::integral_constant<Pattern, Pattern::kO200k>{});
  }
}

}  // namespace fastgpt
