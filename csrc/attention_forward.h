// Forward: one task is a few query tiles of one head, key tiles streamed past them with an online softmax
// (FlashAttention-2, arXiv 2307.08691, algorithm 1), in base 2 and transposed.
#pragma once
#include "attention_pairs.h"

namespace longtrain {
namespace LT_ISA {

// Scores S^T -> probabilities P^T in place, relative to the running maximum `m`; sums into `l`; `alpha` is what the rows
// gathered so far must be multiplied by. m and l per query, in units of the (capped) score x.
template <bool Cap, bool Drop, bool Mask, class T>
static void softmax_tile(T* st, int nk, int nq, const TileMask& mask, const Constants<T>& c, const uint32_t* hash_a,
                         const uint32_t* hash_b, int64_t first_position, T* m, T* l, T* alpha) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Int = typename Simd<T>::Int;
  constexpr int W = lanes<T>;
  const T infinity = std::numeric_limits<T>::infinity();
  const V zero = {}, nothing = zero - infinity;
  for (int v = 0; v < nq; v += W) {
    const I lane = lane_index<T>() + Int(v);
    const V m_old = load<V>(m + v);
    V m_new = m_old;
    for (int j = 0; j < nk; ++j) {
      V x = load<V>(st + j * kLdq + v);
      if (Cap) x = tanhv(x * c.cap_in) * c.cap_out;
      if (Mask) x = ((lane >= Int(mask.lo[j])) & (lane < Int(mask.hi[j]))) ? x : nothing;
      if (Cap || Mask) store(st + j * kLdq + v, x);
      m_new = x > m_new ? x : m_new;
    }
    // A query that has seen nothing has m = -inf: subtract 0 instead, 2^-inf is 0.
    const V base = (m_new == nothing ? zero : m_new) * c.rate;
    V sum = {};
    for (int j = 0; j < nk; ++j) {
      V p = exp2v(load<V>(st + j * kLdq + v) * c.rate - base);
      sum += p;
      if (Drop) p *= keep_factor(hash_a + v, hash_b + v, uint32_t(first_position + j), c.threshold, c.kept);
      store(st + j * kLdq + v, p);
    }
    // Exactly 1 where the maximum stays: rounding in the exponent would gather over the tiles of a long row.
    const V rescale = m_new == m_old ? zero + T(1) : exp2v(m_old * c.rate - base);
    store(alpha + v, rescale);
    store(l + v, load<V>(l + v) * rescale + sum);
    store(m + v, m_new);
  }
}

template <class T, int kDim, bool Pairs> static void forward_worker(const AttentionArgs& args) {
  using V = typename Simd<T>::V;
  constexpr int kLdd = kDim + 16;
  struct Queries {
    T *o, *qt, *m, *l;
    uint32_t hash_a[kTile] = {}, hash_b[kTile] = {};
  } of[kTilesOfTask];
  Scratch<T> scratch(int64_t(3 + kTilesOfTask) * kTile * kLdd + int64_t(kTilesOfTask) * kDim * kLdq + int64_t(kTile) * kLdq +
                     (1 + 2 * kTilesOfTask) * kTile);
  T* qn = scratch.take(kTile * kLdd);
  T* kn = scratch.take(kTile * kLdd);
  T* vn = scratch.take(kTile * kLdd);
  T* st = scratch.take(kTile * kLdq);
  T* alpha = scratch.take(kTile);
  for (Queries& x : of) {
    x.o = scratch.take(kTile * kLdd), x.qt = scratch.take(int64_t(kDim) * kLdq);
    x.m = scratch.take(kTile), x.l = scratch.take(kTile);
  }
  TileMask mask;
  const Constants<T> constants(args);
  const bool cap = args.softcap > 0, drop = args.dropout_p > 0;
  const int64_t n_tasks = args.first_task[args.n_documents];

  for (int64_t index; (index = args.next_task->fetch_add(1)) < n_tasks;) {
    const Task task = task_at(args, index);
    const int n_tiles = int(tiles(task.nq));
    for (int t = 0; t < n_tiles; ++t) {
      const Task tile = tile_of(task, t);
      Queries& x = of[t];
      load_operand<Pairs>(qn, kLdd, args.q, tile.b, tile.q0, tile.h, tile.nq, args.D, args.dtype);
      transpose_operand<Pairs>(x.qt, kLdq, qn, kLdd, tile.nq, args.D, constants.q_factor);
      if (drop) dropout_rows(args, tile, x.hash_a, x.hash_b);
      std::fill(x.m, x.m + kTile, -std::numeric_limits<T>::infinity());
      std::fill(x.l, x.l + kTile, T(0));
      std::fill(x.o, x.o + kTile * kLdd, T(0));
    }

    for_each_key_tile(args, task, [&](int64_t key_tile) {
      const int64_t k0 = task.doc->k_start + key_tile * kTile;
      const int nk = int(std::min<int64_t>(kTile, task.doc->k_stop - k0));
      load_operand<Pairs>(kn, kLdd, args.k, task.b, k0, task.kv, nk, args.D, args.dtype);
      load_tile(vn, kLdd, args.v, task.b, k0, task.kv, nk, args.Dv, args.dtype);
      for (int t = 0; t < n_tiles; ++t) {
        const Task tile = tile_of(task, t);
        Queries& x = of[t];
        const int nq = tile.nq;
        mask.build(args, tile, k0, nk);
        if (mask.empty) continue;
        mask.set_depth(depth_of<Pairs>(args.D));
        scores<Pairs, kLdd, kLdq, kLdq>(kn, x.qt, st, padded_rows(nk), padded<T>(nq), mask.by_key);
        const int64_t position = k0 + args.k_offset;
        const auto softmax = [&](auto function) {
          function(st, nk, nq, mask, constants, x.hash_a, x.hash_b, position, x.m, x.l, alpha);
        };
        if (mask.full)
          cap ? (drop ? softmax(softmax_tile<true, true, false, T>) : softmax(softmax_tile<true, false, false, T>))
              : (drop ? softmax(softmax_tile<false, true, false, T>) : softmax(softmax_tile<false, false, false, T>));
        else
          cap ? (drop ? softmax(softmax_tile<true, true, true, T>) : softmax(softmax_tile<true, false, true, T>))
              : (drop ? softmax(softmax_tile<false, true, true, T>) : softmax(softmax_tile<false, false, true, T>));
        for (int r = 0; r < nq; ++r) {
          if (alpha[r] == T(1)) continue;
          T* row = x.o + r * kLdd;
          for (int d = 0; d < padded<T>(args.Dv); d += lanes<T>) store(row + d, load<V>(row + d) * alpha[r]);
        }
        if (mask.full || all_finite(vn, kLdd, nk, args.Dv))
          gemm<true, kLdq, kLdd, kLdd>(st, vn, x.o, padded_rows(nq), padded<T>(args.Dv), mask.by_query, true);
        else
          masked_product(
              x.o, kLdd, nq, args.Dv, nk, [&](int q, int j) { return mask.sees(j, q); },
              [&](int q, int j) { return st[j * kLdq + q]; }, vn, kLdd, true);
      }
    });

    const int64_t size = element_size(args.dtype);
    for (int i = 0; i < task.nq; ++i) {
      const Queries& x = of[i / kTile];
      const int r = i % kTile;
      const int64_t t = task.q0 + i;
      double lse = x.l[r] == T(0) ? -std::numeric_limits<double>::infinity()
                                  : double(T(x.m[r] * constants.rate)) * 0.693147180559945309417 + std::log(double(x.l[r]));
      double factor = x.l[r] == T(0) ? 0.0 : 1.0 / double(x.l[r]);
      if (args.sink_logits) {
        // The sink only enlarges the denominator.
        const double sink = double(static_cast<const T*>(args.sink_logits)[task.h]);
        const double top = std::max(sink, lse);
        if (std::isfinite(top)) {
          const double with_sink = top + std::log(std::exp(lse - top) + std::exp(sink - top));
          factor *= std::exp(lse - with_sink);
          lse = with_sink;
        }
      }
      static_cast<T*>(args.lse)[(task.b * args.T + t) * args.H + task.h] = T(lse);
      char* dst = args.out.data + (task.b * args.out.batch + t * args.out.token + task.h * args.out.head) * size;
      store_row(dst, args.out.dim, x.o + r * kLdd, T(factor), int(args.Dv), args.dtype);
    }
  }
}

} // namespace LT_ISA
} // namespace longtrain
