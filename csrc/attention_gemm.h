// Products of tiles that lie in cache: C = A B or C += A B, A broadcast element by element, B and C in vectors.
//
// Register block: kRows rows times 2 vectors of accumulators. Rows of A and C are padded to kRows and columns of B and C
// to a vector; what lies in the padding is computed and never read.
#pragma once
#include "tile_product.h"

namespace longtrain {
namespace LT_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 12; // 24 accumulators of 32 registers
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6; // 12 accumulators of 16 registers
#else
constexpr int kRows = 4;
#endif

// Per block of kRows rows: the columns and the depth that matter (the rest is masked); what to skip in a triangle.
struct Extent {
  int n0, n1, k0, k1;
};

// C[rows, columns] (+)= A B, restricted per block of rows to `extents`. ACol: A(m, k) lies at a[k * LDA + m], else at a[m * LDA + k].
template <bool ACol, int LDA, int LDB, int LDC, class T>
static void gemm(const T* a, const T* b, T* c, int rows, int columns, const Extent* extents, bool accumulate) {
  constexpr int W = lanes<T>;
  const Op op = accumulate ? Op::add : Op::set;
  for (int n = 0; n < columns; n += 2 * W) {
    for (int m = 0; m < rows; m += kRows) {
      const Extent& e = extents[m / kRows];
      if (n >= e.n1 || n + 2 * W <= e.n0) continue;
      if (accumulate && e.k0 >= e.k1) continue;
      const T* am = ACol ? a + m : a + m * LDA;
      T* cm = c + m * LDC + n;
      if (n + W < columns)
        tile_update<T, kRows, 2, ACol, LDA, LDB, LDC>(am, b + n, cm, e.k0, e.k1, op);
      else
        tile_update<T, kRows, 1, ACol, LDA, LDB, LDC>(am, b + n, cm, e.k0, e.k1, op);
    }
  }
}

} // namespace LT_ISA
} // namespace longtrain
