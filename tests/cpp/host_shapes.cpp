// Prints what the headers derive from the template arguments of every kernel in a compile unit, one line each.
//
// Compiled with -DUNIT="file". A line holds the name and the fields of w4a16gen.kernels.arrangement.Arrangement.
#include <cstdio>

#include "native/launch.cuh"

template <class S>
void visit(const char* name) {
  std::printf("%s %d %d %d %d %d %d %d %d\n", name, S::WarpgroupsM, S::WarpgroupsK, S::Accumulators, S::CtasPerSm,
              S::Stages, S::SharedBytes, S::StoresThroughShared, S::TailTokens);
}

#include UNIT

int main() {}
