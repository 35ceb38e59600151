// Compiled once per instruction set (setup.py defines LT_ISA and the flags). It includes no ATen and nothing inline that
// another object shares, so that no wide instruction leaks into code that runs everywhere.
#include "attention_backward.h"
#include "attention_forward.h"

namespace longtrain {
namespace LT_ISA {

// What one thread runs until the tasks are used up.
void attention_worker(const AttentionArgs& args, bool backward) {
  const int64_t dim = std::max(args.D, args.Dv);
  const auto run = [&]<class T, bool Pairs>() {
    if (dim <= 64)
      backward ? backward_worker<T, 64, Pairs>(args) : forward_worker<T, 64, Pairs>(args);
    else if (dim <= 128)
      backward ? backward_worker<T, 128, Pairs>(args) : forward_worker<T, 128, Pairs>(args);
    else
      backward ? backward_worker<T, kMaxHeadDim, Pairs>(args) : forward_worker<T, kMaxHeadDim, Pairs>(args);
  };
#if defined(__AVX512BF16__)
  run.template operator()<float, true>(); // this object serves bf16 alone
#else
  if (args.dtype == DType::f64)
    run.template operator()<double, false>();
  else
    run.template operator()<float, false>();
#endif
}

} // namespace LT_ISA
} // namespace longtrain
