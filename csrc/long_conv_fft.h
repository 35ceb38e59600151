// The transform behind long convolutions: real sequences of length 2N, multiplied modulo x^2N + 1, as N complex numbers.
//
// R[x] / (x^2N + 1) is C[z] / (z^N - i) with x^N -> i: a sequence x_0 .. x_2N-1 becomes z_j = x_j + i x_{N+j}, and its values at the N roots
// of z^N = i are all there is to know. Products of sequences are products of values, without the untangling of pairs that a cyclic
// transform of real numbers needs; the reversed sequence has the conjugate values. (The right-angle convolution of Crandall and Fagin.)
//
// Values come in whatever order is cheapest, since products do not mind. Three steps:
//   1. z^N - i = prod over m < L of (z^M - rho_m), N = L M, L the lanes of a vector: a transform across the L rows z_{lM+i}, l < L, whose result m
//      goes to lane m; then z -> tau_m z with tau_m^M = rho_m makes every lane a polynomial modulo z^M - 1 (`enter`, `leave`).
//   2. z^(RQ) - 1 = prod over p < R of (z^Q - w_p), R odd, and again a twist to z^Q - 1 (`odd_pass`).
//   3. z^4q - b^4 = (z^q - b)(z^q + b)(z^q - ib)(z^q + ib), down to q = 1 (`radix4`). The constant b belongs to a block, not to an element, and depends
//      on the block's number alone, whatever the level: one short table serves them all. Blocks are done to the end one after the
//      other once they fit the first-level cache.
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

// Step 1 of `group` sequences at once: `fill(dst, j, n)` writes elements j .. j + n - 1 of each as dst[n][group]. kReal: those from N on are 0.
template <class T, bool kReal, class Fill> void enter(const Transform<T>& t, int64_t group, T* z, int64_t stride, T* staged, const Fill& fill) {
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
template <class T, bool kReal, class Drain> void leave(const Transform<T>& t, int64_t group, const T* z, int64_t stride, T* staged, const Drain& drain) {
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

// A block modulo z^4q - b^4 to four modulo z^q - b, z^q + b, z^q - ib, z^q + ib, or back (times 4). kOne: b = 1.
template <class T, bool kOne> LT_INLINE void radix4(T* x, int64_t q, const Root<T>& w) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  const int64_t step = 2 * L * q;
  for (T* end = x + step; x < end; x += 2 * L) {
    const V ar = load<V>(x), ai = load<V>(x + L);
    V br = load<V>(x + step), bi = load<V>(x + step + L), cr = load<V>(x + 2 * step), ci = load<V>(x + 2 * step + L);
    V dr = load<V>(x + 3 * step), di = load<V>(x + 3 * step + L);
    if constexpr (!kOne) {
      const V b = br, c = cr, d = dr;
      br = br * w.r1 - bi * w.i1, bi = b * w.i1 + bi * w.r1;
      cr = cr * w.r2 - ci * w.i2, ci = c * w.i2 + ci * w.r2;
      dr = dr * w.r3 - di * w.i3, di = d * w.i3 + di * w.r3;
    }
    const V sr = ar + cr, si = ai + ci, tr = ar - cr, ti = ai - ci, pr = br + dr, pi = bi + di, mr = br - dr, mi = bi - di;
    store(x, V(sr + pr)), store(x + L, V(si + pi));
    store(x + step, V(sr - pr)), store(x + step + L, V(si - pi));
    store(x + 2 * step, V(tr - mi)), store(x + 2 * step + L, V(ti + mr));
    store(x + 3 * step, V(tr + mi)), store(x + 3 * step + L, V(ti - mr));
  }
}

template <class T, bool kOne> LT_INLINE void radix4_inverse(T* x, int64_t q, const Root<T>& w) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  const int64_t step = 2 * L * q;
  for (T* end = x + step; x < end; x += 2 * L) {
    const V ar = load<V>(x), ai = load<V>(x + L), br = load<V>(x + step), bi = load<V>(x + step + L);
    const V cr = load<V>(x + 2 * step), ci = load<V>(x + 2 * step + L), dr = load<V>(x + 3 * step), di = load<V>(x + 3 * step + L);
    const V sr = ar + br, si = ai + bi, pr = ar - br, pi = ai - bi, tr = cr + dr, ti = ci + di;
    const V mr = ci - di, mi = dr - cr;  // -i (c - d)
    V yr = pr + mr, yi = pi + mi, zr = sr - tr, zi = si - ti, wr = pr - mr, wi = pi - mi;
    if constexpr (!kOne) {
      const V y = yr, z = zr, v = wr;
      yr = yr * w.r1 + yi * w.i1, yi = yi * w.r1 - y * w.i1;
      zr = zr * w.r2 + zi * w.i2, zi = zi * w.r2 - z * w.i2;
      wr = wr * w.r3 + wi * w.i3, wi = wi * w.r3 - v * w.i3;
    }
    store(x, V(sr + tr)), store(x + L, V(si + ti));
    store(x + step, yr), store(x + step + L, yi);
    store(x + 2 * step, zr), store(x + 2 * step + L, zi);
    store(x + 3 * step, wr), store(x + 3 * step + L, wi);
  }
}

template <class T, bool kInverse> LT_INLINE void radix4_block(T* x, int64_t q, int64_t block, const Root<T>* roots) {
  if constexpr (kInverse)
    block == 0 ? radix4_inverse<T, true>(x, q, roots[0]) : radix4_inverse<T, false>(x, q, roots[block]);
  else
    block == 0 ? radix4<T, true>(x, q, roots[0]) : radix4<T, false>(x, q, roots[block]);
}

// A block of 4^n elements, to single ones or back.
template <class T, bool kInverse> void radix4_tree(T* x, int64_t length, int64_t block, const Root<T>* roots) {
  constexpr int L = lanes<T>;
  constexpr int64_t fits = 32768 / (2 * L * int64_t(sizeof(T)));
  if (length > fits) {
    const int64_t q = length / 4;
    if (!kInverse) radix4_block<T, false>(x, q, block, roots);
    for (int m = 0; m < 4; ++m) radix4_tree<T, kInverse>(x + m * 2 * L * q, q, 4 * block + m, roots);
    if (kInverse) radix4_block<T, true>(x, q, block, roots);
    return;
  }
  if (!kInverse)
    for (int64_t q = length / 4, n = 1; q > 0; q /= 4, n *= 4)
      for (int64_t b = 0; b < n; ++b) radix4_block<T, false>(x + b * 8 * L * q, q, block * n + b, roots);
  else
    for (int64_t q = 1, n = length / 4; n > 0; q *= 4, n /= 4)
      for (int64_t b = 0; b < n; ++b) radix4_block<T, true>(x + b * 8 * L * q, q, block * n + b, roots);
}

// z^length - 1, length a power of two.
template <class T, bool kInverse> void power_tree(T* x, int64_t length, const Root<T>* roots) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  if (!(length & 0xAAAAAAAAAAAAAAAA)) {  // a power of four
    radix4_tree<T, kInverse>(x, length, 0, roots);
    return;
  }
  T* const y = x + length * L;  // the second half
  if (kInverse)
    for (int b = 0; b < 2; ++b) radix4_tree<T, true>(b ? y : x, length / 2, b, roots);
  for (int64_t i = 0; i < length * L; i += L) {
    const V a = load<V>(x + i), b = load<V>(y + i);
    store(x + i, V(a + b)), store(y + i, V(a - b));
  }
  if (!kInverse)
    for (int b = 0; b < 2; ++b) radix4_tree<T, false>(b ? y : x, length / 2, b, roots);
}

// Step 2: R blocks of Q elements; out_p = twist_p * sum over q of a_q w^(pq), w = exp(2 pi i / R), or back (times R).
template <class T, int R, bool kInverse> void odd_pass(T* x, int64_t Q, const T* twist, const T* circle) {
  constexpr int L = lanes<T>, H = R / 2;
  using V = Vec<T>;
  const int64_t step = 2 * L * Q;
  for (int64_t e = 0; e < Q; ++e, x += 2 * L) {
    V ar[R], ai[R];
#pragma GCC unroll 9
    for (int q = 0; q < R; ++q) {
      ar[q] = load<V>(x + q * step), ai[q] = load<V>(x + q * step + L);
      if (kInverse && q > 0) {
        const T wr = twist[2 * ((q - 1) * Q + e)], wi = twist[2 * ((q - 1) * Q + e) + 1];
        const V r = ar[q];
        ar[q] = r * wr + ai[q] * wi, ai[q] = ai[q] * wr - r * wi;
      }
    }
    V total_r = ar[0], total_i = ai[0];
#pragma GCC unroll 4
    for (int q = 1; q <= H; ++q) {
      const V sr = ar[q] + ar[R - q], si = ai[q] + ai[R - q], dr = ar[q] - ar[R - q], di = ai[q] - ai[R - q];
      ar[q] = sr, ai[q] = si, ar[R - q] = dr, ai[R - q] = di;
      total_r += sr, total_i += si;
    }
    store(x, total_r), store(x + L, total_i);
#pragma GCC unroll 4
    for (int p = 1; p <= H; ++p) {
      V cr = ar[0], ci = ai[0], sr = {}, si = {};
#pragma GCC unroll 4
      for (int q = 1; q <= H; ++q) {
        const T c = circle[2 * (p * q % R)], s = circle[2 * (p * q % R) + 1];
        cr += ar[q] * c, ci += ai[q] * c, sr += ar[R - q] * s, si += ai[R - q] * s;
      }
      // cos + i sin: out_p = c + i s, out_(R-p) = c - i s; the inverse exchanges them.
      V pr = cr - si, pi = ci + sr, mr = cr + si, mi = ci - sr;
      if constexpr (kInverse) std::swap(pr, mr), std::swap(pi, mi);
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        const int at = side ? R - p : p;
        V r = side ? mr : pr, i = side ? mi : pi;
        if constexpr (!kInverse) {
          const T wr = twist[2 * ((at - 1) * Q + e)], wi = twist[2 * ((at - 1) * Q + e) + 1];
          const V o = r;
          r = o * wr - i * wi, i = o * wi + i * wr;
        }
        store(x + at * step, r), store(x + at * step + L, i);
      }
    }
  }
}

template <class T, bool kInverse> void odd_pass(const Transform<T>& t, T* z) {
  switch (t.odd) {
    case 3: return odd_pass<T, 3, kInverse>(z, t.power, t.odd_twist, t.odd_circle);
    case 5: return odd_pass<T, 5, kInverse>(z, t.power, t.odd_twist, t.odd_circle);
    case 7: return odd_pass<T, 7, kInverse>(z, t.power, t.odd_twist, t.odd_circle);
    case 9: return odd_pass<T, 9, kInverse>(z, t.power, t.odd_twist, t.odd_circle);
  }
}

// Steps 2 and 3 of one sequence, after `enter`; and back (times M), before `leave`.
template <class T> void forward_inner(const Transform<T>& t, T* z) {
  odd_pass<T, false>(t, z);
  for (int64_t p = 0; p < t.odd; ++p) power_tree<T, false>(z + p * 2 * lanes<T> * t.power, t.power, t.roots);
}
template <class T> void inverse_inner(const Transform<T>& t, T* z) {
  for (int64_t p = 0; p < t.odd; ++p) power_tree<T, true>(z + p * 2 * lanes<T> * t.power, t.power, t.roots);
  odd_pass<T, true>(t, z);
}

// z *= k, or *= its conjugate.
template <class T, bool kConjugate> void multiply(T* z, const T* k, int64_t inner) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  for (T* end = z + 2 * L * inner; z < end; z += 2 * L, k += 2 * L) {
    const V r = load<V>(z), i = load<V>(z + L), kr = load<V>(k), ki = kConjugate ? -load<V>(k + L) : load<V>(k + L);
    store(z, V(r * kr - i * ki)), store(z + L, V(r * ki + i * kr));
  }
}

// p = g conj(v), or += it. p may be v.
template <class T, bool kAdd> void correlate(T* p, const T* g, const T* v, int64_t inner) {
  constexpr int L = lanes<T>;
  using V = Vec<T>;
  for (T* end = p + 2 * L * inner; p < end; p += 2 * L, g += 2 * L, v += 2 * L) {
    const V gr = load<V>(g), gi = load<V>(g + L), vr = load<V>(v), vi = load<V>(v + L);
    V r = gr * vr + gi * vi, i = gi * vr - gr * vi;
    if constexpr (kAdd) r += load<V>(p), i += load<V>(p + L);
    store(p, r), store(p + L, i);
  }
}

}  // namespace LT_ISA
}  // namespace longtrain
