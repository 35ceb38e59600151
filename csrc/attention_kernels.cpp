// Compiled once per instruction set (setup.py defines LT_ISA and the flags). It includes no ATen and nothing inline that
// another object shares, so that no wide instruction leaks into code that runs everywhere.
#include "attention_backward.h"
#include "attention_forward.h"

namespace longtrain {
namespace LT_ISA {

// What one thread runs until the tasks are used up.
void attention_worker(const AttentionArgs& args, bool backward) {
  const int64_t dim = std::max(args.D, args.Dv);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    if (dim <= 64)
      backward ? backward_worker<T, 64>(args) : forward_worker<T, 64>(args);
    else if (dim <= 128)
      backward ? backward_worker<T, 128>(args) : forward_worker<T, 128>(args);
    else
      backward ? backward_worker<T, kMaxHeadDim>(args) : forward_worker<T, kMaxHeadDim>(args);
  };
  if (args.dtype == DType::f64)
    run(double());
  else
    run(float());
}

} // namespace LT_ISA
} // namespace longtrain
