// The machinery for every processor of an architecture (x86-64: SSE2; AArch64: NEON), and the list of all instances.
#include "apply.h"
#include "reduce.h"

namespace fastopt {

#if defined(__x86_64__)
void apply_avx2(const Row&, const Stages&, int64_t, int64_t);    // isa_avx2.cpp
void apply_avx512(const Row&, const Stages&, int64_t, int64_t);  // isa_avx512.cpp
void reduce_avx2(const Row&, Norm, const Stages&, int64_t, int64_t, double*);
void reduce_avx512(const Row&, Norm, const Stages&, int64_t, int64_t, double*);

static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }  // f16c came before both
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Isa isas[] = {
    {"baseline", [] { return true; }, &apply, &reduce},
#if defined(__x86_64__)
    {"avx2", &has_avx2, &apply_avx2, &reduce_avx2},
    {"avx512", &has_avx512, &apply_avx512, &reduce_avx512},
#endif
};
const int isa_count = sizeof(isas) / sizeof(isas[0]);

}  // namespace fastopt
