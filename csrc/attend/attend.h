// Attention of one new token a row over cached keys and values, on a CPU.
//
// A step of decoding reads every cached key and value once and does two operations with each, so it
// is as fast as the memory if nothing is read twice, converted into a buffer or masked by adding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastgpt {

constexpr int kMostDim = 512;

// bfloat16 by its bits.
struct BFloat16 {
  std::uint16_t bits;
};

// Element is float or BFloat16. Heads of `dim` elements, a multiple of 16 up to kMostDim, stand
// side by side in rows of `q`, `k` and `v`; `keys` and `values` are (rows, kv_heads, capacity,
// dim).
template <class Element>
struct Step {
  const Element *q, *k, *v;
  std::ptrdiff_t q_stride, k_stride, v_stride;  // elements from row to row
  Element *keys, *values;
  Element* out;  // (rows, heads * dim)
  int rows, heads, kv_heads, dim, capacity;
  int place;                   // where the new token goes; it attends to places up to its own
  const std::int64_t* starts;  // first place of each row, or null: all begin at 0
  int window;                  // attends to that many places at most; 0: to all
  const float *cos, *sin;      // (capacity, dim / 2), or null: no rotation
  float eps;                   // of the RMS norm of q and k heads; negative: no norm
  float scale;                 // of the scores
  float* scores;               // room for `capacity` floats
};

// Rows [first, last) of a step: stores the new keys and values, then attends.
template <class Element>
using AttendRows = void (*)(const Step<Element>&, int first, int last);

struct Attention {
  const char* name;
  AttendRows<float> floats;
  AttendRows<BFloat16> bfloats;
};

extern const Attention kPlainAttention;
#if defined(__x86_64__)
extern const Attention kAvx2Attention;
extern const Attention kAvx512Attention;
#endif

// Those that this processor runs, the fastest first.
std::vector<const Attention*> attentions();

}  // namespace fastgpt
