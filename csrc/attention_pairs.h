// The operands of the scores S^T = K Q^T and dP^T = V dO^T, and their product.
//
// Pairs: bf16 inputs stay bf16, two neighbours of a row in one 32-bit word, and AVX512-BF16's dot product takes both at once into
// float32 (products are exact, so it is the sum that rounds, as without). Everywhere else operands are tiles of T.
#pragma once
#include "attention_tiles.h"

namespace longtrain {
namespace LT_ISA {

// Words of an operand's row.
template <bool Pairs> static inline int depth_of(int64_t dim) { return int(Pairs ? (dim + 1) / 2 : dim); }

// dst[row][depth]; the second half of an odd row's last word is zero.
template <bool Pairs, class T>
static void load_operand(T* dst, int ld, const Tensor4& x, int64_t b, int64_t token, int64_t head, int rows, int64_t dim,
                         DType dtype) {
  if constexpr (!Pairs) {
    load_tile(dst, ld, x, b, token, head, rows, dim, dtype);
  } else {
    const uint16_t* src = reinterpret_cast<const uint16_t*>(x.data) + b * x.batch + token * x.token + head * x.head;
    const auto prefetch = [&](int r) { prefetch_row(reinterpret_cast<const char*>(src + r * x.token), dim * 2, false); };
    for (int r = 0; r < std::min(rows, kRowsAhead); ++r) prefetch(r);
    for (int r = 0; r < rows; ++r) {
      if (r + kRowsAhead < rows) prefetch(r + kRowsAhead);
      T* row = dst + int64_t(r) * ld;
      if (dim % 2) row[dim / 2] = T(0);
      if (x.dim == 1)
        std::memcpy(row, src + r * x.token, dim * 2);
      else
        for (int64_t d = 0; d < dim; ++d) std::memcpy(reinterpret_cast<char*>(row) + 2 * d, src + r * x.token + d * x.dim, 2);
    }
  }
}

// dst[depth][row] = sign * src[row][depth]
template <bool Pairs, class T>
static void transpose_operand(T* dst, int ldd, const T* src, int lds, int rows, int64_t dim, T sign) {
  if constexpr (!Pairs) {
    transpose(dst, ldd, src, lds, rows, dim, sign);
  } else {
    const uint32_t flip = sign < T(0) ? 0x80008000u : 0, keep = sign == T(0) ? 0 : ~0u;
    const int depth = depth_of<true>(dim);
    for (int d0 = 0; d0 < depth; d0 += 16)
      for (int r = 0; r < rows; ++r)
        for (int d = d0; d < std::min(depth, d0 + 16); ++d) {
          uint32_t word;
          std::memcpy(&word, src + int64_t(r) * lds + d, 4);
          word = (word ^ flip) & keep;
          std::memcpy(dst + int64_t(d) * ldd + r, &word, 4);
        }
  }
}

#if defined(__AVX512BF16__)
template <int NV, int LDA, int LDB, int LDC>
static inline __attribute__((always_inline)) void micro_pairs(const float* a, const float* b, float* c, int depth) {
  __m512 acc[kRows][NV];
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < NV; ++n) acc[m][n] = _mm512_setzero_ps();
  for (int k = 0; k < depth; ++k, ++a, b += LDB) {
    __m512bh bn[NV];
    for (int n = 0; n < NV; ++n) bn[n] = (__m512bh)_mm512_loadu_ps(b + n * 16);
    for (int m = 0; m < kRows; ++m) {
      const __m512bh am = (__m512bh)_mm512_set1_ps(a[m * LDA]);
      for (int n = 0; n < NV; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], am, bn[n]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < NV; ++n) _mm512_storeu_ps(c + m * LDC + n * 16, acc[m][n]);
}
#endif

// C[rows, columns] = A B of operands, restricted per block of rows to `extents`.
template <bool Pairs, int LDA, int LDB, int LDC, class T>
static void scores(const T* a, const T* b, T* c, int rows, int columns, const Extent* extents) {
  if constexpr (!Pairs) {
    gemm<false, LDA, LDB, LDC>(a, b, c, rows, columns, extents, false);
  } else {
#if defined(__AVX512BF16__)
    for (int n = 0; n < columns; n += 32)
      for (int m = 0; m < rows; m += kRows) {
        const Extent& e = extents[m / kRows];
        if (n >= e.n1 || n + 32 <= e.n0) continue;
        if (n + 16 < columns)
          micro_pairs<2, LDA, LDB, LDC>(a + m * LDA, b + n, c + m * LDC + n, e.k1);
        else
          micro_pairs<1, LDA, LDB, LDC>(a + m * LDA, b + n, c + m * LDC + n, e.k1);
      }
#endif
  }
}

} // namespace LT_ISA
} // namespace longtrain
