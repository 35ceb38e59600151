// Compiled once per instruction set, as attention_kernels.cpp.
#include "linear_attention_shared.h"

namespace longtrain {
namespace LT_ISA {

template <class F> static auto linear_as(const LinearArgs& args, const F& run) {
  const bool narrow = args.D <= 64 && args.V <= 64;
  if (args.wide) return narrow ? run.template operator()<double, 64>() : run.template operator()<double, kLinearWidest>();
  return narrow ? run.template operator()<float, 64>() : run.template operator()<float, kLinearWidest>();
}

LinearBytes linear_workspace(const LinearArgs& args) {
  return linear_as(args, [&]<class T, int LD>() { return LinearHead<T, LD>::workspace(args); });
}

// What one thread runs until the tasks are used up.
void linear_worker(const LinearArgs& args, bool backward, int thread) {
  linear_as(args, [&]<class T, int LD>() {
    char* workspace = args.workspace + thread * args.workspace_bytes;
    for (int64_t task; (task = args.next_task->fetch_add(1)) < args.whole + shared_tasks(args);)
      if (task < args.whole) {
        LinearHead<T, LD> head(args, workspace, task);
        backward ? head.backward() : head.forward();
      } else {
        take_shared<T, LD>(args, backward, workspace, task - args.whole);
      }
  });
}

}  // namespace LT_ISA
}  // namespace longtrain
