// Attention of some rows, for whichever instructions the including file has enabled. All of it has
// internal linkage: a linker that merged the versions could choose one this processor cannot run.
#pragma once

#include <cstring>

#include "attend.h"

#if defined(__GNUC__)
// Everything that takes or returns a vector is inlined, so its calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastgpt {
namespace {

constexpr int kLanes = 16;
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Words = std::uint32_t __attribute__((vector_size(kLanes * sizeof(float))));
using Halves = std::uint16_t __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));

#define INLINE inline __attribute__((always_inline))

template <class To, class From>
INLINE To bits(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from, "the same bits");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

INLINE void load(const float* p, Floats& x) { std::memcpy(&x, p, sizeof x); }
INLINE void load(const BFloat16* p, Floats& x) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  x = bits<Floats>(__builtin_convertvector(h, Words) << 16);
}

INLINE void store(float* p, const Floats& x) { std::memcpy(p, &x, sizeof x); }
// Rounds to nearest, ties to even. What is stored here is finite, or NaN with a high bit set.
INLINE void store(BFloat16* p, const Floats& x) {
  const Words w = bits<Words>(x);
  const Words up = w + 0x7fff + ((w >> 16) & 1);
  const Words nan = bits<Words>(x != x);
  const Halves h = __builtin_convertvector(((up & ~nan) | ((w | 0x400000) & nan)) >> 16, Halves);
  std::memcpy(p, &h, sizeof h);
}

INLINE Floats rounded(const Floats& x, const float*) { return x; }
INLINE Floats rounded(const Floats& x, const BFloat16*) {
  BFloat16 stored[kLanes];
  Floats y;
  store(stored, x);
  load(stored, y);
  return y;
}

INLINE float sum(const Floats& x) {
  float parts[kLanes];
  std::memcpy(parts, &x, sizeof parts);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

// e^x for x <= 0, to 2e-7 of it; 0 below -87. 2^n times a polynomial (Taylor) of |r| <= ln(2)/2.
INLINE Floats exp_of(const Floats& x) {
  const Floats shifter = Floats{} + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer
  const Floats n = (x * 1.44269504f + shifter) - shifter;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = Floats{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words power = (bits<Words>(n + shifter) << 23) + bits<Words>(Floats{} + 1.0f);
  const Words gone = bits<Words>(x < -87.0f);
  return bits<Floats>(bits<Words>(p * bits<Floats>(power)) & ~gone);
}

// Writes a head to `to` after the norm and the rotation of the step.
template <class Element>
INLINE void prepare(const Step<Element>& step, const Element* from, int place, Element* to) {
  const int dim = step.dim, half = dim / 2;
  float gain = 1;
  if (step.eps >= 0) {
    Floats squares{};
    for (int d = 0; d < dim; d += kLanes) {
      Floats x;
      load(from + d, x);
      squares += x * x;
    }
    gain = 1 / __builtin_sqrtf(sum(squares) / dim + step.eps);
  }
  float x[kMostDim];
  for (int d = 0; d < dim; d += kLanes) {
    Floats part;
    load(from + d, part);
    if (step.eps >= 0) part = rounded(part * gain, from);
    store(x + d, part);
  }
  if (step.cos) {
    const float* cos = step.cos + static_cast<std::ptrdiff_t>(place) * half;
    const float* sin = step.sin + static_cast<std::ptrdiff_t>(place) * half;
    for (int d = 0; d < half; ++d) {
      const float low = x[d], high = x[d + half];
      x[d] = low * cos[d] - high * sin[d];
      x[d + half] = high * cos[d] + low * sin[d];
    }
  }
  for (int d = 0; d < dim; d += kLanes) {
    Floats part;
    load(x + d, part);
    store(to + d, part);
  }
}

// Asks for the 16 * `parts` elements at `p`, which are read soon: the processor's own prefetcher
// has hardly begun when a head's few KB are over.
template <class Element>
INLINE void ask_for(const Element* p, int parts) {
  constexpr int kLine = 64 / sizeof(Element);
  for (int i = 0; i < parts * kLanes; i += kLine) __builtin_prefetch(p + i);
}

// Scores of places [first, last) into `scores`, and the largest.
template <int Parts, class Element>
INLINE float score(const Element* q, const Element* keys, const Element* values, int first,
                   int last, int parts, float scale, float* scores) {
  const int n = Parts ? Parts : parts;
  float most = -__builtin_inff();
  Floats query[Parts ? Parts : kMostDim / kLanes];
  for (int i = 0; i < n; ++i) load(q + i * kLanes, query[i]);
  for (int t = first; t < last; ++t) {
    const Element* key = keys + static_cast<std::ptrdiff_t>(t) * n * kLanes;
    ask_for(values + static_cast<std::ptrdiff_t>(t) * n * kLanes, n);
    Floats total{};
    for (int i = 0; i < n; ++i) {
      Floats x;
      load(key + i * kLanes, x);
      total += query[i] * x;
    }
    scores[t] = sum(total) * scale;
    most = scores[t] > most ? scores[t] : most;
  }
  return most;
}

// Turns scores into weights of sum 1.
INLINE void weigh(float* scores, int first, int last, float most) {
  Floats total{};
  int t = first;
  for (; t + kLanes <= last; t += kLanes) {
    Floats x;
    load(scores + t, x);
    x = exp_of(x - most);
    store(scores + t, x);
    total += x;
  }
  if (t < last) {
    Floats x = Floats{} - __builtin_inff();
    std::memcpy(&x, scores + t, (last - t) * sizeof(float));
    x = exp_of(x - most);
    std::memcpy(scores + t, &x, (last - t) * sizeof(float));
    total += x;
  }
  const float inverse = 1 / sum(total);
  for (t = first; t < last; ++t) scores[t] *= inverse;
}

// The weighted sum of `Parts` * 16 columns of the values of places [first, last).
template <int Parts, class Element>
INLINE void mix(const float* weights, const Element* values, const Element* next, int dim,
                int first, int last, Element* out) {
  Floats total[Parts] = {};
  for (int t = first; t < last; ++t) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * dim;
    const Element* value = values + at;
    ask_for(next + at, Parts);
    for (int i = 0; i < Parts; ++i) {
      Floats x;
      load(value + i * kLanes, x);
      total[i] += x * weights[t];
    }
  }
  for (int i = 0; i < Parts; ++i) store(out + i * kLanes, total[i]);
}

template <class Element>
void attend_rows(const Step<Element>& step, int first_row, int last_row) {
  const int dim = step.dim, parts = dim / kLanes, group = step.heads / step.kv_heads;
  const std::ptrdiff_t head_size = static_cast<std::ptrdiff_t>(step.capacity) * dim;
  const int end = step.place + 1;
  Element query[kMostDim];
  for (int row = first_row; row < last_row; ++row) {
    const int start = step.starts ? static_cast<int>(step.starts[row]) : 0;
    const int first = step.window && end - step.window > start ? end - step.window : start;
    for (int head = 0; head < step.heads; ++head) {
      const std::ptrdiff_t kv = head / group;
      Element* keys = step.keys + (row * step.kv_heads + kv) * head_size;
      Element* values = step.values + (row * step.kv_heads + kv) * head_size;
      const std::ptrdiff_t here = static_cast<std::ptrdiff_t>(step.place) * dim;
      if (head % group == 0) {
        prepare(step, step.k + row * step.k_stride + kv * dim, step.place - start, keys + here);
        std::memcpy(values + here, step.v + row * step.v_stride + kv * dim, dim * sizeof(Element));
      }
      prepare(step, step.q + row * step.q_stride + head * dim, step.place - start, query);
      const float most =
          parts == 4   ? score<4>(query, keys, values, first, end, parts, step.scale, step.scores)
          : parts == 8 ? score<8>(query, keys, values, first, end, parts, step.scale, step.scores)
                       : score<0>(query, keys, values, first, end, parts, step.scale, step.scores);
      weigh(step.scores, first, end, most);
      const Element* next = keys + head_size;
      Element* out = step.out + (static_cast<std::ptrdiff_t>(row) * step.heads + head) * dim;
      int part = 0;
      for (; part + 4 <= parts; part += 4) {
        const int d = part * kLanes;
        mix<4>(step.scores, values + d, next + d, dim, first, end, out + d);
      }
      for (; part < parts; ++part) {
        const int d = part * kLanes;
        mix<1>(step.scores, values + d, next + d, dim, first, end, out + d);
      }
    }
  }
}

#undef INLINE

constexpr Attention named(const char* name) {
  return {name, attend_rows<float>, attend_rows<BFloat16>};
}

}  // namespace
}  // namespace fastgpt
