// The mask scanner for AVX-512.
#include "piece_finder.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,bmi,bmi2,lzcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,bmi,bmi2,lzcnt")
#endif

#include "mask_scanner.h"

namespace fastgpt {
namespace {

struct Avx512 {
  static Bits between(__m512i v, char first, char last) {
    return _mm512_cmple_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8(first)),
                                  _mm512_set1_epi8(static_cast<char>(last - first)));
  }
  static Bits equal(__m512i v, char c) { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(c)); }

  static Masks classify(const std::uint8_t* p) {
    const __m512i v = _mm512_loadu_si512(p);
    Masks m;
    m.letter = between(_mm512_or_si512(v, _mm512_set1_epi8(0x20)), 'a', 'z');
    m.upper = between(v, 'A', 'Z');
    m.digit = between(v, '0', '9');
    m.space = equal(v, ' ');
    m.white = m.space | between(v, '\t', '\r');
    m.newline = equal(v, '\n') | equal(v, '\r');
    m.apostrophe = equal(v, '\'');
    m.slash = equal(v, '/');
    m.high = _mm512_movepi8_mask(v);
    return m;
  }
};

}  // namespace

const PieceFinders kAvx512Finders = masked_finders<Avx512>();

}  // namespace fastgpt

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
