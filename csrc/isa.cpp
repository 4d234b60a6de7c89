// The choice of an instruction set.

#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace synpo {
namespace {

bool always() { return true; }
bool never() { return false; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's dot products of bf16 take longer than widening and two of the fp32 units' multiplications: a Xeon took 1.38 to 1.44
// times as long with them. AMD's are the fastest way there.
bool has_quick_dot_products() { return !on_intel(); }

// The CPU must have the instructions, and the kernel must keep the tile registers: Linux asks processes to request them
// before their first use.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;  // amx-bf16, amx-tile
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Entry {
  Isa isa;
  const char* name;
  bool (*runs)();
  bool (*chosen)();  // unasked, where it runs
};

// Best first.
const Entry kEntries[] = {
#if defined(__x86_64__)
    {Isa::amx, "amx", has_amx, always},
    {Isa::avx512_bf16, "avx512_bf16", has_avx512_bf16, has_quick_dot_products},
    {Isa::avx512, "avx512", has_avx512, always},
    {Isa::avx2, "avx2", has_avx2, always},
#endif
    {Isa::portable, "portable", always, always},
#if defined(__x86_64__)
    {Isa::amx_emulated, "amx-emulated", has_avx512_bf16, never},
#endif
};

const Entry* named(const std::string& name, const char* asked_by) {
  std::string here;
  for (const Entry& entry : kEntries) {
    if (!entry.runs()) continue;
    if (entry.name == name) return &entry;
    here += (here.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument(asked_by + ("instruction set '" + name) + "' is unknown or not supported by this CPU; here run " + here);
}

const Entry* choose() {
  const char* wanted = std::getenv("SYNPO_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') return named(wanted, "SYNPO_CPU_ISA: ");
  for (const Entry& entry : kEntries) {
    if (entry.runs() && entry.chosen()) return &entry;
  }
  return nullptr;  // not reached: the portable one runs everywhere
}

std::atomic<const Entry*> in_use{nullptr};

const Entry& current() {
  const Entry* entry = in_use;
  if (entry == nullptr) in_use = entry = choose();
  return *entry;
}

}  // namespace

bool on_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Isa isa() { return current().isa; }

const char* isa_name() { return current().name; }

std::vector<const char*> isa_names() {
  std::vector<const char*> names;
  for (const Entry& entry : kEntries) {
    if (entry.runs()) names.push_back(entry.name);
  }
  return names;
}

void use_isa(const char* name) { in_use = name == nullptr ? nullptr : named(name, ""); }

}  // namespace synpo
