// Instruction sets of the CPU: which there are, which run here, and which is in use by every loop of this extension.

#pragma once

#include <vector>

namespace synpo {

// amx_emulated is the path of amx with the tile registers in memory, for tests.
enum class Isa { amx, avx512_bf16, avx512, avx2, portable, amx_emulated };

// The one in use: the last asked for by `use_isa`, else that of $SYNPO_CPU_ISA, else the best here. The choice depends on the
// CPU's model alone, never on a timing, so that a run that is resumed rounds as it did before.
// Throws std::invalid_argument where the environment names one that is unknown or does not run here.
Isa isa();
const char* isa_name();
std::vector<const char*> isa_names();  // those that run here, best first
void use_isa(const char* name);        // null: choose anew; throws std::invalid_argument as above
bool on_intel();

}  // namespace synpo
