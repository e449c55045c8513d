// The mask scanner for NEON.
#include "piece_finder.h"

#if defined(__GNUC__) && defined(__aarch64__)
#include <arm_neon.h>

#include "mask_scanner.h"

namespace fastgpt {
namespace {

struct Neon {
  // f gives 0 or 255 for each of 16 bytes; a bit of each becomes the mask.
  template <class F>
  static Bits pack(const uint8x16x4_t& v, F&& f) {
    const uint8x16_t weights = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t low =
        vpaddq_u8(vandq_u8(f(v.val[0]), weights), vandq_u8(f(v.val[1]), weights));
    const uint8x16_t high =
        vpaddq_u8(vandq_u8(f(v.val[2]), weights), vandq_u8(f(v.val[3]), weights));
    const uint8x16_t sums = vpaddq_u8(low, high);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)), 0);
  }
  static Bits between(const uint8x16x4_t& v, std::uint8_t first, std::uint8_t last) {
    return pack(v, [=](uint8x16_t x) {
      return vcleq_u8(vsubq_u8(x, vdupq_n_u8(first)), vdupq_n_u8(last - first));
    });
  }
  static Bits equal(const uint8x16x4_t& v, std::uint8_t c) {
    return pack(v, [=](uint8x16_t x) { return vceqq_u8(x, vdupq_n_u8(c)); });
  }

  static Masks classify(const std::uint8_t* p) {
    const uint8x16x4_t v{{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
    Masks m;
    m.upper = between(v, 'A', 'Z');
    m.letter = m.upper | between(v, 'a', 'z');
    m.digit = between(v, '0', '9');
    m.space = equal(v, ' ');
    m.white = m.space | between(v, '\t', '\r');
    m.newline = equal(v, '\n') | equal(v, '\r');
    m.apostrophe = equal(v, '\'');
    m.slash = equal(v, '/');
    m.high = pack(v, [](uint8x16_t x) { return vcgeq_u8(x, vdupq_n_u8(0x80)); });
    return m;
  }
};

}  // namespace

const PieceFinders kNeonFinders = masked_finders<Neon>();

}  // namespace fastgpt
#endif
