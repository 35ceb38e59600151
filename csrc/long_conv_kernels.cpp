// Compiled once per instruction set, as attention_kernels.cpp.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "long_conv_direct.h"
#include "long_conv_transform.h"

namespace longtrain {
namespace LT_ISA {

int long_conv_lanes(bool wide) { return wide ? lanes<double> : lanes<float>; }

// What one thread runs until the groups of channels are used up.
void long_conv_worker(const LongConvArgs& args, bool backward, int thread) {
  const auto run = [&](auto zero, auto of_tensor) {
    using T = decltype(zero);
    using S = decltype(of_tensor);
    T* workspace = reinterpret_cast<T*>(args.workspace + thread * args.workspace_bytes);
    const int64_t groups = (args.E + args.group - 1) / args.group;
    for (int64_t group; (group = args.next_group->fetch_add(1)) < groups;) {
      if (args.direct) {
        DirectGroup<T, S> work(args, group, workspace);
        backward ? work.backward() : work.forward();
      } else {
        TransformGroup<T, S> work(args, group, workspace, backward);
        backward ? work.backward() : work.forward();
      }
    }
  };
  switch (args.dtype) {
    case DType::f64: return run(double(), double());
    case DType::f32: return run(float(), float());
    case DType::bf16: return run(float(), Bf16());
    case DType::f16: return run(float(), F16());
  }
}

}  // namespace LT_ISA
}  // namespace longtrain
