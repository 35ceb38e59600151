// Decays inside a chunk and scores under them, as in longtrain/ops/linear_attention/decay.py; here as products of the tokens' own decays
// a = exp(g), each at most 1, so that nothing is divided out and no two sums are subtracted. A product below the smallest normal number is 0.
//
// Tiles: a, rows, k [kChunk, LD]; scores [kChunk, kChunk]; n tokens and D features, multiples of 16 (a = 1 and k = 0 where there is no token).
#pragma once
#include <limits>

#include "linear_attention_gemm.h"

namespace longtrain {
namespace LT_ISA {

constexpr int C = kChunk;
constexpr int kLeaf = 16;  // tokens whose scores are made pair by pair

// e^x for x <= 0: x = n ln 2 + r, ln 2 in two parts (Cody and Waite).
static inline vfloat decay_exp(vfloat x) {
  const vfloat zero = {}, clipped = x < -104.f ? zero - 104.f : x;
  const vfloat n = (clipped * 1.44269504f + 12582912.f) - 12582912.f;
  const vfloat r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  return x < -87.f ? zero : exp2v(n) * exp2v(r * 1.44269504f);
}
static inline vdouble decay_exp(vdouble x) {
  const vdouble zero = {}, clipped = x < -745. ? zero - 745. : x;
  const vdouble n = (clipped * 1.4426950408889634 + 6755399441055744.) - 6755399441055744.;
  const vdouble r = (clipped - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  return x < -708. ? zero : exp2v(n) * exp2v(r * 1.4426950408889634);
}
template <class T> static void decay_exp(T* x, int n) {
  for (int i = 0; i < n; i += lanes<T>) store(x + i, decay_exp(load<typename Simd<T>::V>(x + i)));
}

// x * decay, 0 where that is no longer a normal number.
template <class T> static inline T decayed(T x, T decay) {
  const T y = x * decay;
  return y < std::numeric_limits<T>::min() ? T(0) : y;
}

// One decay a head: to[i] = a_1 .. a_i, behind[j] = a_j+1 .. a_n, between [i, j] = a_j+1 .. a_i for j <= i, 0 elsewhere.
template <class T> static void head_decays(const T* a, T* to, T* behind, T* between, int n) {
  for (int i = 0; i < n; ++i) {
    const T* above = between + (i - 1) * C;
    T* row = between + i * C;
    for (int j = 0; j < i; ++j) row[j] = decayed(above[j], a[i]);
    row[i] = 1;
    for (int j = i + 1; j < n; ++j) row[j] = 0;
    to[i] = i ? decayed(to[i - 1], a[i]) : a[0];
  }
  for (int j = 0; j < n; ++j) behind[j] = between[(n - 1) * C + j];
}

// One a feature: row i of `to` is a_first .. a_i, row j of `behind` a_j+1 .. a_stop-1.
template <int LD, class T> static void decays_to(const T* a, T* to, int first, int stop, int D) {
  for (int d = 0; d < D; ++d) to[first * LD + d] = a[first * LD + d];
  for (int i = first + 1; i < stop; ++i)
    for (int d = 0; d < D; ++d) to[i * LD + d] = decayed(to[(i - 1) * LD + d], a[i * LD + d]);
}
template <int LD, class T> static void decays_behind(const T* a, T* behind, int first, int stop, int D) {
  for (int d = 0; d < D; ++d) behind[(stop - 1) * LD + d] = 1;
  for (int j = stop - 2; j >= first; --j)
    for (int d = 0; d < D; ++d) behind[j * LD + d] = decayed(behind[(j + 1) * LD + d], a[(j + 1) * LD + d]);
}

// With one decay a feature: blocks of two halves, from kLeaf tokens a half on. visit(first, middle, stop).
template <class F> static inline void each_halving(int n, const F& visit) {
  for (int half = kLeaf; half < n; half *= 2)
    for (int first = 0; first + half < n; first += 2 * half) visit(first, first + half, std::min(n, first + 2 * half));
}

// `side`: decays from the middle to the later rows, and behind the earlier ones up to it; `met`: rows and keys times these.
template <int LD, class T>
static void meet(const T* rows, const T* k, const T* a, T* side, T* met, int first, int middle, int stop, int D) {
  decays_behind<LD>(a, side, first, middle, D);
  decays_to<LD>(a, side, middle, stop, D);
  for (int i = first; i < stop; ++i)
    for (int d = 0; d < D; ++d) met[i * LD + d] = (i < middle ? k : rows)[i * LD + d] * side[i * LD + d];
}

// A leaf's scores, kLeaf keys in vectors: from token to token they decay, and one more key joins them.
template <int LD, class T> static void leaf_scores(const T* rows, const T* kT, const T* a, T* scores, int first, int D) {
  using V = typename Simd<T>::V;
  constexpr int W = lanes<T>;
  const V zero = {};
  const auto index = lane_index<T>();
  for (int j = 0; j < kLeaf; j += W) {
    V sums[kLeaf];
    for (int i = 0; i < kLeaf; ++i) sums[i] = zero;
    for (int d = 0; d < D; ++d) {
      const V keys = load<V>(kT + int64_t(d) * C + first + j);
      V met = zero;
      for (int i = j; i < kLeaf; ++i) {
        met *= a[(first + i) * LD + d];
        if (i < j + W) met += index == typename Simd<T>::Int(i - j) ? keys : zero;
        sums[i] += rows[(first + i) * LD + d] * met;
      }
    }
    for (int i = 0; i < kLeaf; ++i) store(scores + (first + i) * C + first + j, sums[i]);
  }
}

template <int LD, class T>
static void leaf_scores_vjp(const T* dscores, const T* rows, const T* k, const T* a, T* drows, T* dk, T* dg, int first, int D) {
  using V = typename Simd<T>::V;
  for (int d = 0; d < D; d += lanes<T>)
    for (int j = first; j < first + kLeaf; ++j) {
      V met[kLeaf], back = {};
      met[0] = load<V>(k + j * LD + d);
      for (int i = j; i < first + kLeaf; ++i) {
        if (i > j) met[i - j] = met[i - j - 1] * load<V>(a + i * LD + d);
        store(drows + i * LD + d, load<V>(drows + i * LD + d) + dscores[i * C + j] * met[i - j]);
      }
      for (int i = first + kLeaf - 1; i > j; --i) {
        back += dscores[i * C + j] * load<V>(rows + i * LD + d);
        store(dg + i * LD + d, load<V>(dg + i * LD + d) + back * met[i - j]);
        back *= load<V>(a + i * LD + d);
      }
      back += dscores[j * C + j] * load<V>(rows + j * LD + d);
      store(dk + j * LD + d, load<V>(dk + j * LD + d) + back);
    }
}

// Scores under one decay a feature. Scratch: side, met [kChunk, LD], metT [LD, kChunk].
template <int LD, class T>
static void feature_scores(const T* rows, const T* k, const T* kT, const T* a, T* scores, T* side, T* met, T* metT, int n, int D) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) scores[i * C + j] = 0;
  for (int first = 0; first < n; first += kLeaf) leaf_scores<LD>(rows, kT, a, scores, first, D);
  each_halving(n, [&](int first, int middle, int stop) {
    meet<LD>(rows, k, a, side, met, first, middle, stop, D);
    transpose<LD, C>(met + first * LD, metT, middle - first, D);
    product<Op::set, Shape::full, false, LD, C, C>(met + middle * LD, metT, scores + middle * C + first, stop - middle, middle - first, D);
  });
}

// Adds to drows, dk and dg. Scratch as above, and dmet [kChunk, LD].
template <int LD, class T>
static void feature_scores_vjp(const T* dscores, const T* rows, const T* k, const T* a, T* drows, T* dk, T* dg, T* side, T* met, T* dmet,
                               int n, int D) {
  for (int first = 0; first < n; first += kLeaf) leaf_scores_vjp<LD>(dscores, rows, k, a, drows, dk, dg, first, D);
  each_halving(n, [&](int first, int middle, int stop) {
    meet<LD>(rows, k, a, side, met, first, middle, stop, D);
    const T* block = dscores + middle * C + first;
    product<Op::set, Shape::full, false, C, LD, LD>(block, met + first * LD, dmet + middle * LD, stop - middle, D, middle - first);
    product<Op::set, Shape::full, true, C, LD, LD>(block, met + middle * LD, dmet + first * LD, middle - first, D, stop - middle);
    for (int i = first; i < stop; ++i) {
      T* d = (i < middle ? dk : drows) + i * LD;
      for (int e = 0; e < D; ++e) d[e] += dmet[i * LD + e] * side[i * LD + e];
    }
    for (int i = first; i < stop; ++i)
      for (int e = 0; e < D; ++e) dmet[i * LD + e] *= met[i * LD + e];
    for (int j = first + 1; j < middle; ++j)  // dg_m: of the keys before m, and of the rows from m on
      for (int e = 0; e < D; ++e) dg[j * LD + e] += dmet[(j - 1) * LD + e], dmet[j * LD + e] += dmet[(j - 1) * LD + e];
    for (int i = stop - 1; i >= middle; --i)
      for (int e = 0; e < D; ++e) {
        if (i + 1 < stop) dmet[i * LD + e] += dmet[(i + 1) * LD + e];
        dg[i * LD + e] += dmet[i * LD + e];
      }
  });
}

// Sum of x[i] y[i] over i < n.
template <class T> static inline T dot(const T* x, const T* y, int n) {
  using V = typename Simd<T>::V;
  constexpr int W = lanes<T>;
  V sums = {};
  int i = 0;
  for (; i + W <= n; i += W) sums += load<V>(x + i) * load<V>(y + i);
  T part[W];
  store(part, sums);
  for (int half = W / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  for (; i < n; ++i) part[0] += x[i] * y[i];
  return part[0];
}

// dg [n] of one decay a head: dg_m += sum of dscores_ij scores_ij over j < m <= i. `sums`, `ones`: scratch [kChunk].
template <class T> static void head_scores_vjp(const T* dscores, const T* scores, T* dg, T* sums, T* ones, int n) {
  for (int j = 0; j < n; ++j) sums[j] = 0, ones[j] = 1;
  for (int m = n - 1; m > 0; --m) {
    for (int j = 0; j < m; ++j) sums[j] += dscores[m * C + j] * scores[m * C + j];
    dg[m] += dot(sums, ones, m);
  }
}

}  // namespace LT_ISA
}  // namespace longtrain
