// Products of tiles in cache: C = A B, C += A B or C -= A B. Rows, columns and depth are multiples of 16, leading dimensions constants.
//
// Register block: kHeight rows times kWidth vectors; 16 = 2 x 6 + 4 and 32 = 5 x 6 + 2, so that what is left are bands of 4 and 2.
#pragma once
#include <algorithm>
#include <type_traits>

#include "tile_product.h"

namespace longtrain {
namespace LT_ISA {

#if defined(__AVX512F__)
constexpr int kHeight = 6, kWidth = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kHeight = 6, kWidth = 2;
#else
constexpr int kHeight = 4, kWidth = 2;
#endif

// What is left out: columns of C right of its diagonal, zeros of A right or left of its own.
enum class Shape { full, lower_c, lower_a, upper_a };

// ACol: A(m, k) lies at a[k * LDA + m], else at a[m * LDA + k].
template <Op op, Shape shape, bool ACol, int LDA, int LDB, int LDC, class T>
static void product(const T* a, const T* b, T* c, int rows, int columns, int depth) {
  constexpr int W = lanes<T>;
  int m = 0;
  const auto bands = [&](auto height) {
    constexpr int R = decltype(height)::value;
    for (; m + R <= rows; m += R) {
      const T* am = ACol ? a + m : a + int64_t(m) * LDA;
      T* cm = c + int64_t(m) * LDC;
      const int k0 = shape == Shape::upper_a ? m : 0, k1 = shape == Shape::lower_a ? std::min(depth, m + R) : depth;
      const int stop = shape == Shape::lower_c ? std::min(columns, (m + R + W - 1) / W * W) : columns;
      int n = 0;
      for (; n + kWidth * W <= stop; n += kWidth * W) tile_update<T, R, kWidth, ACol, LDA, LDB, LDC>(am, b + n, cm + n, k0, k1, op);
      if (kWidth > 2 && n + 2 * W <= stop) {
        tile_update<T, R, 2, ACol, LDA, LDB, LDC>(am, b + n, cm + n, k0, k1, op);
        n += 2 * W;
      }
      if (n + W <= stop) tile_update<T, R, 1, ACol, LDA, LDB, LDC>(am, b + n, cm + n, k0, k1, op);
    }
  };
  bands(std::integral_constant<int, kHeight>());
  if constexpr (kHeight > 4) bands(std::integral_constant<int, 4>());
  bands(std::integral_constant<int, 2>());
}

// dst [columns, rows] = src [rows, columns] transposed; both multiples of 16.
template <int LDS, int LDD, class T>
static void transpose(const T* src, T* dst, int rows, int columns) {
  for (int r = 0; r < rows; r += 16)
    for (int c = 0; c < columns; c += 16)
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) dst[int64_t(c + i) * LDD + r + j] = src[int64_t(r + j) * LDS + c + i];
}

}  // namespace LT_ISA
}  // namespace longtrain
