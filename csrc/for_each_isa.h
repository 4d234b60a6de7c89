// Includes the file SYNPO_LOOPS, code written once on a small vector type, once per instruction set up to SYNPO_MOST_LEVEL:
// with SYNPO_ISA naming a namespace of its own and SYNPO_LEVEL the set (3 AVX-512 with bf16, 2 AVX-512, 1 AVX2, 0 any).
// What the loops need from other headers must be included before: whatever they include is compiled for the set too.

#define SYNPO_ISA portable
#define SYNPO_LEVEL 0
#include SYNPO_LOOPS
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#if defined(__x86_64__)

#define SYNPO_ISA avx2
#define SYNPO_LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,popcnt")
#endif
#include SYNPO_LOOPS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#define SYNPO_ISA avx512
#define SYNPO_LEVEL 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2,popcnt,prefer-vector-width=512")
#endif
#include SYNPO_LOOPS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNPO_ISA
#undef SYNPO_LEVEL

#if SYNPO_MOST_LEVEL >= 3
#define SYNPO_ISA avx512_bf16
#define SYNPO_LEVEL 3
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,prefer-vector-width=512")
#endif
#include SYNPO_LOOPS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SYNPO_ISA
#undef SYNPO_LEVEL
#endif

#endif  // __x86_64__

#undef SYNPO_LOOPS
#undef SYNPO_MOST_LEVEL
