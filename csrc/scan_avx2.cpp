// The mask scanner for AVX2.
#include "piece_finder.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt")
#endif

#include "mask_scanner.h"

namespace fastgpt {
namespace {

struct Avx2 {
  struct Bytes {
    __m256i low, high;
  };
  static Bits pack(__m256i low, __m256i high) {
    const auto low_bits = static_cast<std::uint32_t>(_mm256_movemask_epi8(low));
    const auto high_bits = static_cast<std::uint32_t>(_mm256_movemask_epi8(high));
    return static_cast<Bits>(high_bits) << 32 | low_bits;
  }
  static __m256i between(__m256i v, char first, char last) {
    const __m256i from_first = _mm256_sub_epi8(v, _mm256_set1_epi8(first));
    const __m256i most = _mm256_set1_epi8(static_cast<char>(last - first));
    return _mm256_cmpeq_epi8(_mm256_min_epu8(from_first, most), from_first);
  }
  static Bits between(Bytes v, char first, char last) {
    return pack(between(v.low, first, last), between(v.high, first, last));
  }
  static Bits equal(Bytes v, char c) {
    const __m256i wanted = _mm256_set1_epi8(c);
    return pack(_mm256_cmpeq_epi8(v.low, wanted), _mm256_cmpeq_epi8(v.high, wanted));
  }

  static Masks classify(const std::uint8_t* p) {
    const auto* const source = reinterpret_cast<const __m256i*>(p);
    const Bytes v{_mm256_loadu_si256(source), _mm256_loadu_si256(source + 1)};
    const __m256i bit = _mm256_set1_epi8(0x20);
    const Bytes lower{_mm256_or_si256(v.low, bit), _mm256_or_si256(v.high, bit)};
    Masks m;
    m.letter = between(lower, 'a', 'z');
    m.upper = between(v, 'A', 'Z');
    m.digit = between(v, '0', '9');
    m.space = equal(v, ' ');
    m.white = m.space | between(v, '\t', '\r');
    m.newline = equal(v, '\n') | equal(v, '\r');
    m.apostrophe = equal(v, '\'');
    m.slash = equal(v, '/');
    m.high = pack(v.low, v.high);
    return m;
  }
};

}  // namespace

const PieceFinders kAvx2Finders = masked_finders<Avx2>();

}  // namespace fastgpt

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
