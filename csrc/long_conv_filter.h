// A filter's taps at their places in a sequence of 2N elements modulo x^2N + 1, and what a gradient there adds to the filter's.
#pragma once
#include <sched.h>

#include "attention_simd.h"
#include "long_conv_args.h"

namespace longtrain {
namespace LT_ISA {

// dst[i] = factor * element j + i: lag s is element s, lag -s is element 2N - s with its sign changed.
template <class T> struct LaidFilter {
  const LongConvArgs& a;
  int64_t filter;
  T factor;

  void operator()(T* dst, int64_t j, int64_t n) const {
    const int64_t past = std::clamp<int64_t>(a.past - j, 0, n), future = std::clamp<int64_t>(2 * a.size - a.future - j, past, n);
    if (past) copy(dst, j, past, factor);
    std::memset(dst + past, 0, sizeof(T) * (future - past));
    if (future < n) copy(dst + future, j + future - (2 * a.size - a.W), n - future, -factor);
  }

  void copy(T* dst, int64_t tap, int64_t n, T scale) const {
    load_row(dst, a.k + filter * a.k_row + tap * element_size(a.k_dtype), 1, int(n), a.k_dtype);
    T not_finite = 0;  // 0 x is 0 for what is finite, else NaN
    for (int64_t i = 0; i < n; ++i) not_finite += dst[i] * T(0), dst[i] *= scale;
    if (not_finite != 0) note();
  }

  void note() const {
    int64_t before = a.bad_row->load();
    while ((before < 0 || filter < before) && !a.bad_row->compare_exchange_weak(before, filter)) {
    }
  }
};

// The order of additions to one row of dk: group after group, whoever runs them. Where nothing was added before, it is written.
template <class T> struct FilterGradient {
  const LongConvArgs& a;
  int64_t filter;
  T* row;
  bool write;

  FilterGradient(const LongConvArgs& args, int64_t filter_, int64_t group)
      : a(args), filter(filter_), row(static_cast<T*>(args.dk) + filter_ * args.W) {
    const int64_t turn = group - filter * a.share / a.group;
    while (a.tickets[filter].load(std::memory_order_acquire) != turn) sched_yield();
    write = a.first && turn == 0;
    if (write) std::memset(row + a.past, 0, sizeof(T) * (a.W - a.past - a.future));
  }
  ~FilterGradient() { a.tickets[filter].fetch_add(1, std::memory_order_release); }
  FilterGradient(const FilterGradient&) = delete;

  void add(int64_t tap, const T* src, int64_t n, T factor) const {
    if (write)
      for (int64_t i = 0; i < n; ++i) row[tap + i] = src[i] * factor;
    else
      for (int64_t i = 0; i < n; ++i) row[tap + i] += src[i] * factor;
  }
};

}  // namespace LT_ISA
}  // namespace longtrain
