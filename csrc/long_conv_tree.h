// Steps 2 and 3 of the transform in long_conv_fft.h: the odd factor, then blocks in four down to single elements. Products of values.
#pragma once
#include "long_conv_fft.h"

namespace longtrain {
namespace LT_ISA {

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
