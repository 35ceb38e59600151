// The innermost product of attention and linear attention: a block of A B in registers, A broadcast element by element, B in vectors.
#pragma once
#include "attention_simd.h"

namespace longtrain {
namespace LT_ISA {

// sums[R, NV vectors] = A B over k0 <= k < k1. ACol: A(m, k) lies at a[k * LDA + m], else at a[m * LDA + k]. Leading dimensions are
// constants, so that the addresses of the R rows of A are immediates, and one moving pointer for A and one for B serve them all.
template <class T, int R, int NV, bool ACol, int LDA, int LDB>
static inline __attribute__((always_inline)) void tile_product(const T* a, const T* b, int k0, int k1, typename Simd<T>::V (&sums)[R][NV]) {
  using V = typename Simd<T>::V;
  for (int m = 0; m < R; ++m)
    for (int n = 0; n < NV; ++n) sums[m][n] = V{};
  const T* ak = ACol ? a + int64_t(k0) * LDA : a + k0;
  const T* bk = b + int64_t(k0) * LDB;
  for (int k = k0; k < k1; ++k, ak += ACol ? LDA : 1, bk += LDB) {
    V bn[NV];
    for (int n = 0; n < NV; ++n) bn[n] = load<V>(bk + n * lanes<T>);
    for (int m = 0; m < R; ++m) {
      const T am = ak[ACol ? m : m * LDA];
      for (int n = 0; n < NV; ++n) sums[m][n] += am * bn[n];
    }
  }
}

enum class Op { set, add, subtract };

// C[R, NV vectors] = A B, += A B or -= A B. C is added last: a sum of short sums loses less to rounding than one long chain.
template <class T, int R, int NV, bool ACol, int LDA, int LDB, int LDC>
static inline __attribute__((always_inline)) void tile_update(const T* a, const T* b, T* c, int k0, int k1, Op op) {
  using V = typename Simd<T>::V;
  V acc[R][NV];
  tile_product<T, R, NV, ACol, LDA, LDB>(a, b, k0, k1, acc);
  for (int m = 0; m < R; ++m)
    for (int n = 0; n < NV; ++n) {
      T* to = c + m * LDC + n * lanes<T>;
      store(to, op == Op::set ? acc[m][n] : op == Op::add ? load<V>(to) + acc[m][n] : load<V>(to) - acc[m][n]);
    }
}

}  // namespace LT_ISA
}  // namespace longtrain
