// What the kernels call a tensor's values.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "attention_args.h"

namespace longtrain {

inline DType dtype_of(const char* op, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_VALUE(false, op, ": dtype: found ", x.scalar_type(), ", expected a floating type");
  }
}

}  // namespace longtrain
