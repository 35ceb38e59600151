// The transform behind long convolutions: real sequences of length 2N, multiplied modulo x^2N + 1, as N complex numbers.
//
// R[x] / (x^2N + 1) is C[z] / (z^N - i) with x^N -> i: a sequence x_0 .. x_2N-1 becomes z_j = x_j + i x_{N+j}, and its values at the N
// roots of z^N = i are all there is to know. Products of sequences are products of values, without the untangling of pairs that a cyclic
// transform of real numbers needs; the reversed sequence has the conjugate values. (The right-angle convolution of Crandall and Fagin.)
//
// Values come in whatever order is cheapest, since products do not mind. Three steps:
//   1. z^N - i = prod over m < L of (z^M - rho_m), N = L M, L the lanes of a vector: a transform across the L rows z_{lM+i}, l < L,
//      whose result m goes to lane m; then z -> tau_m z with tau_m^M = rho_m makes every lane a polynomial modulo z^M - 1 (`enter`,
//      `leave`, here).
//   2. z^(RQ) - 1 = prod over p < R of (z^Q - w_p), R odd, and again a twist to z^Q - 1 (`odd_pass` in long_conv_tree.h).
//   3. z^4q - b^4 = (z^q - b)(z^q + b)(z^q - ib)(z^q + ib), down to q = 1 (`radix4`). The constant b belongs to a block, not to an
//      element, and depends on the block's number alone, whatever the level: one short table serves them all. Blocks are done to
//      the end one after the other once they fit the first-level cache.
//
// Element i of a transform is a vector of L real parts and a vector of L imaginary parts.
#pragma once
#include <algorithm>
#include <utility>

#include "attention_simd.h"
#include "long_conv_args.h"

namespace longtrain {
namespace LT_ISA {

#define LT_INLINE static inline __attribute__((always_inline))

template <class T> using Vec = typename Simd<T>::V;

template <class T> struct Root {  // b, b^2, b^3
  T r1, i1, r2, i2, r3, i3;
};

// Rows to columns, in log2(L) rounds: round S exchanges what differs in bit S of row and column.
template <class T, int S, int... j> LT_INLINE void transpose_round(Vec<T>* v, std::integer_sequence<int, j...>) {
  constexpr int L = lanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & S)) {
      const Vec<T> a = v[i], b = v[i + S];
#if defined(__clang__)
      v[i] = __builtin_shufflevector(a, b, (j & S ? L + j - S : j)...);
      v[i + S] = __builtin_shufflevector(a, b, (j & S ? L + j : j + S)...);
#else
      v[i] = __builtin_shuffle(a, b, typename Simd<T>::I{(j & S ? L + j - S : j)...});
      v[i + S] = __builtin_shuffle(a, b, typename Simd<T>::I{(j & S ? L + j : j + S)...});
#endif
    }
}
template <class T> LT_INLINE void transpose(Vec<T>* v) {
  constexpr int L = lanes<T>;
  constexpr auto all = std::make_integer_sequence<int, L>();
  transpose_round<T, 1>(v, all);
  if constexpr (L > 2) transpose_round<T, 2>(v, all);
  if constexpr (L > 4) transpose_round<T, 4>(v, all);
  if constexpr (L > 8) transpose_round<T, 8>(v, all);
}

// X_m = sum over l < 4 of x_l i^(lm), in place. With real and imaginary parts exchanged: i^(-lm).
template <class V> LT_INLINE void dft4(V& r0, V& i0, V& r1, V& i1, V& r2, V& i2, V& r3, V& i3) {
  const V sr = r0 + r2, si = i0 + i2, dr = r0 - r2, di = i0 - i2, pr = r1 + r3, pi = i1 + i3, mr = r1 - r3, mi = i1 - i3;
  r0 = sr + pr, i0 = si + pi, r2 = sr - pr, i2 = si - pi;
  r1 = dr - mi, i1 = di + mr, r3 = dr + mi, i3 = di - mr;
}

// X_m = sum over l < L of x_l exp(2 pi i l m / L), L = 2, 4, 8, 16. With l = K a + b, m = m0 + 4 m1, K = L / 4:
// X = sum over b of exp(2 pi i b m1 / K) exp(2 pi i b m0 / L) sum over a of i^(a m0) x.
template <class T> LT_INLINE void dft_rows(Vec<T>* r, Vec<T>* i) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  if constexpr (L == 2) {
    const V a = r[0], b = i[0];
    r[0] = a + r[1], i[0] = b + i[1], r[1] = a - r[1], i[1] = b - i[1];
  } else {
    constexpr int K = L / 4;
    constexpr double half = 0.70710678118654752440, c = 0.92387953251128675613, s = 0.38268343236508977173;
    constexpr double cosine[10] = {1, c, half, s, 0, -s, -half, -c, -1, -c}, sine[10] = {0, s, half, c, 1, c, half, s, 0, -s};
    V yr[L], yi[L];
#pragma GCC unroll 4
    for (int b = 0; b < K; ++b) {
      dft4(r[b], i[b], r[K + b], i[K + b], r[2 * K + b], i[2 * K + b], r[3 * K + b], i[3 * K + b]);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const int e = b * m * (16 / L), at = K * m + b;
        if (e == 0) {
          yr[at] = r[at], yi[at] = i[at];
        } else if (e == 4) {
          yr[at] = -i[at], yi[at] = r[at];
        } else {
          const T wr = T(cosine[e]), wi = T(sine[e]);
          yr[at] = r[at] * wr - i[at] * wi, yi[at] = r[at] * wi + i[at] * wr;
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const int at = K * m;
      if constexpr (K == 4) dft4(yr[at], yi[at], yr[at + 1], yi[at + 1], yr[at + 2], yi[at + 2], yr[at + 3], yi[at + 3]);
      if constexpr (K == 2) {
        const V a = yr[at], b = yi[at];
        yr[at] = a + yr[at + 1], yi[at] = b + yi[at + 1], yr[at + 1] = a - yr[at + 1], yi[at + 1] = b - yi[at + 1];
      }
#pragma GCC unroll 4
      for (int n = 0; n < K; ++n) r[m + 4 * n] = yr[at + n], i[m + 4 * n] = yi[at + n];
    }
  }
}

// One transform's shape and constants.
template <class T> struct Transform {
  int64_t size, inner, odd, power;  // N, M = N / L, R, Q = M / R
  const T *weight, *twist, *odd_twist, *odd_circle;
  const Root<T>* roots;

  explicit Transform(const LongConvArgs& a)
      : size(a.size), inner(a.size / lanes<T>), odd(a.odd), power(inner / a.odd), weight(static_cast<const T*>(a.tables.weight)),
        twist(static_cast<const T*>(a.tables.twist)), odd_twist(static_cast<const T*>(a.tables.odd_twist)),
        odd_circle(static_cast<const T*>(a.tables.odd_circle)), roots(static_cast<const Root<T>*>(a.tables.roots)) {}
};

// Step 1 of `group` sequences at once: `fill(dst, j, n)` writes elements j .. j + n - 1 of each as dst[n][group]. kReal: those
// from N on are 0.
template <class T, bool kReal, class Fill>
void enter(const Transform<T>& t, int64_t group, T* z, int64_t stride, T* staged, const Fill& fill) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  const int64_t run = std::min<int64_t>(kRunElements / group, t.inner);
  for (int64_t i0 = 0; i0 < t.inner; i0 += run) {
    const int64_t n = std::min(run, t.inner - i0);
    for (int l = 0; l < L; ++l) {
      fill(staged + l * kRunElements, l * t.inner + i0, n);
      if (!kReal) fill(staged + (L + l) * kRunElements, t.size + l * t.inner + i0, n);
    }
    for (int64_t v = 0; v < n * group; v += L) {
      V r[L], i[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const V x = load<V>(staged + l * kRunElements + v);
        const T wr = t.weight[2 * l], wi = t.weight[2 * l + 1];
        r[l] = x * wr, i[l] = x * wi;
        if constexpr (!kReal) {
          const V y = load<V>(staged + (L + l) * kRunElements + v);
          r[l] -= y * wi, i[l] += y * wr;
        }
      }
      dft_rows<T>(r, i);
      transpose<T>(r);
      transpose<T>(i);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const int64_t element = i0 + (v + l) / group;
        const T* w = t.twist + 2 * L * element;
        const V wr = load<V>(w), wi = load<V>(w + L);
        T* dst = z + (v + l) % group * stride + 2 * L * element;
        store(dst, V(r[l] * wr - i[l] * wi));
        store(dst + L, V(r[l] * wi + i[l] * wr));
      }
    }
  }
}

// The inverse of `enter`, times N: `drain(src, j, n)` takes elements j .. j + n - 1. kReal: those from N on are not asked for.
template <class T, bool kReal, class Drain>
void leave(const Transform<T>& t, int64_t group, const T* z, int64_t stride, T* staged, const Drain& drain) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  const int64_t run = std::min<int64_t>(kRunElements / group, t.inner);
  for (int64_t i0 = 0; i0 < t.inner; i0 += run) {
    const int64_t n = std::min(run, t.inner - i0);
    for (int64_t v = 0; v < n * group; v += L) {
      V r[L], i[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const int64_t element = i0 + (v + l) / group;
        const T *w = t.twist + 2 * L * element, *src = z + (v + l) % group * stride + 2 * L * element;
        const V wr = load<V>(w), wi = load<V>(w + L), a = load<V>(src), b = load<V>(src + L);
        r[l] = a * wr + b * wi, i[l] = b * wr - a * wi;
      }
      transpose<T>(r);
      transpose<T>(i);
      dft_rows<T>(i, r);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const T wr = t.weight[2 * l], wi = t.weight[2 * l + 1];
        store(staged + l * kRunElements + v, V(r[l] * wr + i[l] * wi));
        if constexpr (!kReal) store(staged + (L + l) * kRunElements + v, V(i[l] * wr - r[l] * wi));
      }
    }
    for (int l = 0; l < L; ++l) {
      drain(staged + l * kRunElements, l * t.inner + i0, n);
      if (!kReal) drain(staged + (L + l) * kRunElements, t.size + l * t.inner + i0, n);
    }
  }
}

}  // namespace LT_ISA
}  // namespace longtrain
