// Compiled once per instruction set, as attention_kernels.cpp.
#include "linear_attention_chunk.h"

namespace longtrain {
namespace LT_ISA {

template <class F> static auto linear_as(const LinearArgs& args, const F& run) {
  const bool narrow = args.D <= 64 && args.V <= 64;
  if (args.wide) return narrow ? run.template operator()<double, 64>() : run.template operator()<double, kLinearWidest>();
  return narrow ? run.template operator()<float, 64>() : run.template operator()<float, kLinearWidest>();
}

int64_t linear_workspace(const LinearArgs& args) {
  return linear_as(args, [&]<class T, int LD>() { return LinearHead<T, LD>::workspace(args); });
}

// What one thread runs until the heads are used up.
void linear_worker(const LinearArgs& args, bool backward, int thread) {
  linear_as(args, [&]<class T, int LD>() {
    for (int64_t head; (head = args.next_head->fetch_add(1)) < args.B * args.H;) {
      LinearHead<T, LD> work(args, args.workspace + thread * args.workspace_bytes, head);
      backward ? work.backward() : work.forward();
    }
  });
}

}  // namespace LT_ISA
}  // namespace longtrain
