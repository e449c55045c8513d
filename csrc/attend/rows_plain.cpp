// Attention with the instructions that every processor of the kind has (NEON among them on Arm),
// and the list of versions.
#include "attend.h"
#include "rows.h"

namespace fastgpt {

const Attention kPlainAttention = named("plain");

std::vector<const Attention*> attentions() {
  std::vector<const Attention*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Attention);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kAvx2Attention);
  }
#endif
  found.push_back(&kPlainAttention);
  return found;
}

}  // namespace fastgpt
