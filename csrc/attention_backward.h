// Backward: one task is a few query tiles of one head; each tile's scores are computed once and serve dQ, dK and dV.
//
// dQ belongs to the task. dK and dV of a key tile are added to by every task that sees it, and floating-point addition
// does not commute in its rounding, so they take turns: ticket (batch, kv head, key tile) counts the tasks that have
// added, a task's turn is its rank among those that see the tile, and it computes first and waits last. Ranks follow the
// order in which tasks are handed out, so whoever is waited for has already started: no deadlock, and results are bitwise
// the same for any number of threads. FlashAttention-2 does the same for dQ in its deterministic mode.
#pragma once
#include <thread>
#include "attention_pairs.h"

namespace longtrain {
namespace LT_ISA {

// P^T and dS^T in place of S^T and dP^T (formulas in reference.py).
template <bool Cap, bool Drop, bool Mask, class T>
static void gradient_tile(T* st, T* dpt, int nk, int nq, const TileMask& mask, const Constants<T>& c,
                          const uint32_t* hash_a, const uint32_t* hash_b, int64_t first_position, const T* lse2,
                          const T* delta) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Int = typename Simd<T>::Int;
  constexpr int W = lanes<T>;
  const V zero = {};
  for (int j = 0; j < nk; ++j) {
    T *s_row = st + j * kLdq, *dp_row = dpt + j * kLdq;
    for (int v = 0; v < nq; v += W) {
      if (Mask && (v >= mask.hi[j] || v + W <= mask.lo[j])) {
        store(s_row + v, zero);
        store(dp_row + v, zero);
        continue;
      }
      V x = load<V>(s_row + v), slope = zero;
      if (Cap) {
        const V t = tanhv(x * c.cap_in);
        x = t * c.cap_out;
        slope = T(1) - t * t;
      }
      V p = exp2v(x * c.rate - load<V>(lse2 + v));
      V dp = load<V>(dp_row + v);
      V kept = zero;
      if (Drop) {
        kept = keep_factor(hash_a + v, hash_b + v, uint32_t(first_position + j), c.threshold, c.kept);
        dp *= kept;
      }
      V ds = p * (dp - load<V>(delta + v));
      if (Cap) ds *= slope;
      if (Drop) p *= kept;
      if (Mask) {
        const I lane = lane_index<T>() + Int(v);
        const I visible = (lane >= Int(mask.lo[j])) & (lane < Int(mask.hi[j]));
        p = visible ? p : zero;
        ds = visible ? ds : zero;
      }
      store(s_row + v, p);
      store(dp_row + v, ds);
    }
  }
}

template <class T>
static void add_tile(const Tensor4& wide, int64_t b, int64_t token, int64_t head, int rows, int64_t dim, const T* src,
                     int ld, T factor) {
  T* base = reinterpret_cast<T*>(wide.data) + b * wide.batch + token * wide.token + head * wide.head;
  for (int r = 0; r < rows; ++r) {
    T* dst = base + r * wide.token;
    const T* row = src + int64_t(r) * ld;
    if (r + kRowsAhead < rows) prefetch_row(reinterpret_cast<const char*>(dst + kRowsAhead * wide.token), dim * sizeof(T), true);
    if (wide.dim == 1)
      for (int64_t d = 0; d < dim; ++d) dst[d] += factor * row[d];
    else
      for (int64_t d = 0; d < dim; ++d) dst[d * wide.dim] += factor * row[d];
  }
}

static inline void wait_for_turn(const std::atomic<int32_t>& ticket, int32_t turn) {
  for (int spins = 0; ticket.load(std::memory_order_acquire) != turn; ++spins)
    if (spins > 64) std::this_thread::yield();
}

template <class T, int kDim, bool Pairs> static void backward_worker(const AttentionArgs& args) {
  constexpr int kLdd = kDim + 16;
  struct Queries {
    T *qn, *don, *dq, *qt, *dot, *lse2, *delta;
    uint32_t hash_a[kTile] = {}, hash_b[kTile] = {};
  } of[kTilesOfTask];
  Scratch<T> scratch(int64_t(4 + Pairs + 3 * kTilesOfTask) * kTile * kLdd + int64_t(2 * kTilesOfTask) * kDim * kLdq + int64_t(2) * kTile * kLdq +
                     2 * kTilesOfTask * kTile);
  T* kn = scratch.take(kTile * kLdd);
  T* k_scores = Pairs ? scratch.take(kTile * kLdd) : kn;
  T* v_scores = scratch.take(kTile * kLdd);
  T* dk = scratch.take(kTile * kLdd);
  T* dv = scratch.take(kTile * kLdd);
  T* st = scratch.take(kTile * kLdq);
  T* dpt = scratch.take(kTile * kLdq);
  for (Queries& x : of) {
    x.qn = scratch.take(kTile * kLdd), x.don = scratch.take(kTile * kLdd), x.dq = scratch.take(kTile * kLdd);
    x.qt = scratch.take(int64_t(kDim) * kLdq), x.dot = scratch.take(int64_t(kDim) * kLdq);
    x.lse2 = scratch.take(kTile), x.delta = scratch.take(kTile);
  }
  TileMask mask;
  const Constants<T> constants(args);
  const bool cap = args.softcap > 0, drop = args.dropout_p > 0;
  const int64_t n_tasks = args.first_task[args.n_documents], group = args.H / args.K;
  const int64_t n_key_tiles = args.first_key_tile[args.n_documents];

  for (int64_t index; (index = args.next_task->fetch_add(1)) < n_tasks;) {
    const Task task = task_at(args, index);
    const int n_tiles = int(tiles(task.nq));
    for (int t = 0; t < n_tiles; ++t) {
      const Task tile = tile_of(task, t);
      Queries& x = of[t];
      load_tile(x.qn, kLdd, args.q, tile.b, tile.q0, tile.h, tile.nq, args.D, args.dtype);
      load_tile(x.don, kLdd, args.dout, tile.b, tile.q0, tile.h, tile.nq, args.Dv, args.dtype);
      const auto transposed = [&](T* to, T* rows, const Tensor4& from, int64_t dim, T sign) {
        if constexpr (Pairs) load_operand<Pairs>(rows = v_scores, kLdd, from, tile.b, tile.q0, tile.h, tile.nq, dim, args.dtype);
        transpose_operand<Pairs>(to, kLdq, rows, kLdd, tile.nq, dim, sign);
      };
      transposed(x.qt, x.qn, args.q, args.D, constants.q_factor);
      transposed(x.dot, x.don, args.dout, args.Dv, T(1));
      for (int r = 0; r < tile.nq; ++r) {
        const int64_t at = (tile.b * args.T + tile.q0 + r) * args.H + tile.h;
        x.lse2[r] = static_cast<const T*>(args.lse)[at] * T(1.44269504088896340736);
        x.delta[r] = static_cast<const T*>(args.delta)[at];
      }
      if (drop) dropout_rows(args, tile, x.hash_a, x.hash_b);
      std::fill(x.dq, x.dq + kTile * kLdd, T(0));
    }

    for_each_key_tile(args, task, [&](int64_t key_tile) {
      const int64_t k0 = task.doc->k_start + key_tile * kTile;
      const int nk = int(std::min<int64_t>(kTile, task.doc->k_stop - k0)), rows_k = padded_rows(nk);
      load_tile(kn, kLdd, args.k, task.b, k0, task.kv, nk, args.D, args.dtype);
      if constexpr (Pairs) load_operand<Pairs>(k_scores, kLdd, args.k, task.b, k0, task.kv, nk, args.D, args.dtype);
      load_operand<Pairs>(v_scores, kLdd, args.v, task.b, k0, task.kv, nk, args.Dv, args.dtype);
      bool add = false; // whether dk, dv hold what an earlier query tile gave
      for (int t = 0; t < n_tiles; ++t) {
        const Task tile = tile_of(task, t);
        Queries& x = of[t];
        const int nq = tile.nq, rows_q = padded_rows(nq), columns = padded<T>(nq);
        mask.build(args, tile, k0, nk);
        if (mask.empty) continue;
        mask.set_depth(depth_of<Pairs>(args.D));
        scores<Pairs, kLdd, kLdq, kLdq>(k_scores, x.qt, st, rows_k, columns, mask.by_key);
        mask.set_depth(depth_of<Pairs>(args.Dv));
        scores<Pairs, kLdd, kLdq, kLdq>(v_scores, x.dot, dpt, rows_k, columns, mask.by_key);
        const int64_t position = k0 + args.k_offset;
        const auto gradient = [&](auto function) {
          function(st, dpt, nk, nq, mask, constants, x.hash_a, x.hash_b, position, x.lse2, x.delta);
        };
        if (mask.full)
          cap ? (drop ? gradient(gradient_tile<true, true, false, T>) : gradient(gradient_tile<true, false, false, T>))
              : (drop ? gradient(gradient_tile<false, true, false, T>) : gradient(gradient_tile<false, false, false, T>));
        else
          cap ? (drop ? gradient(gradient_tile<true, true, true, T>) : gradient(gradient_tile<true, false, true, T>))
              : (drop ? gradient(gradient_tile<false, true, true, T>) : gradient(gradient_tile<false, false, true, T>));

        const bool clean = mask.full || (all_finite(kn, kLdd, nk, args.D) && all_finite(x.qn, kLdd, nq, args.D) &&
                                         all_finite(x.don, kLdd, nq, args.Dv));
        if (clean) {
          gemm<false, kLdq, kLdd, kLdd>(st, x.don, dv, rows_k, padded<T>(args.Dv), mask.by_key_depth, add);
          gemm<false, kLdq, kLdd, kLdd>(dpt, x.qn, dk, rows_k, padded<T>(args.D), mask.by_key_depth, add);
          gemm<true, kLdq, kLdd, kLdd>(dpt, kn, x.dq, rows_q, padded<T>(args.D), mask.by_query, true);
        } else {
          const auto key_sees = [&](int j, int q) { return mask.sees(j, q); };
          masked_product(dv, kLdd, nk, args.Dv, nq, key_sees, [&](int j, int q) { return st[j * kLdq + q]; }, x.don, kLdd, add);
          masked_product(dk, kLdd, nk, args.D, nq, key_sees, [&](int j, int q) { return dpt[j * kLdq + q]; }, x.qn, kLdd, add);
          masked_product(
              x.dq, kLdd, nq, args.D, nk, [&](int q, int j) { return mask.sees(j, q); },
              [&](int q, int j) { return dpt[j * kLdq + q]; }, kn, kLdd, true);
        }
        add = true;
      }

      std::atomic<int32_t>& ticket =
          args.tickets[(task.b * args.K + task.kv) * n_key_tiles + task.first_key_tile + key_tile];
      const int32_t turn = int32_t((tasks_seeing(args, task, key_tile).hi - 1 - task.number) * group + task.g);
      wait_for_turn(ticket, turn);
      if (add) {
        add_tile(args.dk, task.b, k0, task.kv, nk, args.D, dk, kLdd, T(args.scale));
        add_tile(args.dv, task.b, k0, task.kv, nk, args.Dv, dv, kLdd, T(1));
      }
      ticket.store(turn + 1, std::memory_order_release);
    });

    const int64_t size = element_size(args.dtype);
    for (int r = 0; r < task.nq; ++r) {
      char* dst = args.dq.data + (task.b * args.dq.batch + (task.q0 + r) * args.dq.token + task.h * args.dq.head) * size;
      store_row(dst, args.dq.dim, of[r / kTile].dq + (r % kTile) * kLdd, T(args.scale), int(args.D), args.dtype);
    }
  }
}

} // namespace LT_ISA
} // namespace longtrain
