// Everything that is compiled once per instruction set for the frozen-head pass. No include guard.

#include "head_vec.h"

#include "head_tiles.h"

#if SYNPO_LEVEL == 3
#include "head_amx.h"
#endif
