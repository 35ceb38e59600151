// One chunk of a head; formulas and names as in longtrain/ops/linear_attention/chunked.py. Its tiles are padded with zeros to multiples of
// 16; systems of the delta rule are solved by substitution in blocks of 16 tokens. Every element of a state, of U and of dU is made of its
// own column of V by the same operations, however many columns are worked on at a time.
#pragma once
#include "linear_attention_args.h"
#include "linear_attention_decay.h"

namespace longtrain {
namespace LT_ISA {

static inline int padded(int64_t n) { return int((n + 15) / 16 * 16); }

// A chunk, as the passes along the chunks need it and leave it: tiles of tokens [C, LD], scores [C, C], the state at its entry and the
// adjoint of that at its exit [LD, LD].
template <class T, int LD> struct alignas(64) Kept {
  T q_to[C * LD], k_to[C * LD], k_behind[C * LD], u[C * LD], du[C * LD], p[C * C], system[C * C], s[LD * LD], ds[LD * LD];
  T beta[C], through[LD];
};

// What a thread holds besides.
template <class T, int LD> struct alignas(64) Tiles {
  Kept<T, LD> kept;
  T q[C * LD], k[C * LD], v[C * LD], dout[C * LD];
  T a[C * LD], to[C * LD], behind[C * LD], side[C * LD], met[C * LD], dmet[C * LD];
  T dx[C * LD], dq[C * LD], dk[C * LD], dg[C * LD], dq_to[C * LD], dk_to[C * LD], dk_behind[C * LD];
  T kT[LD * C], uT[LD * C], metT[LD * C];
  T m[C * C], between[C * C], dp[C * C], dm[C * C], raw[C * C];
  T sT[LD * LD], dsT[LD * LD];
  T dthrough[LD], sums[C], ones[C], row[LD];
};

template <class T, int LD> struct LinearChunk {
  const LinearArgs& args;
  Tiles<T, LD>& t;
  const int64_t b, h;
  const int D, V;
  const bool delta;
  Kept<T, LD>* kept = nullptr;
  T *q = nullptr, *k = nullptr;  // what does not decay is its own decayed one
  const T* k_to = nullptr;
  int64_t first = 0;  // token
  int count = 0, n = 0;  // tokens, and these padded

  LinearChunk(const LinearArgs& args, Tiles<T, LD>& tiles, int64_t head)
      : args(args), t(tiles), b(head / args.H), h(head % args.H), D(padded(args.D)), V(padded(args.V)), delta(args.beta.data) {}

  // The chunk of tokens from `token` on, and before `stop`.
  void at(Kept<T, LD>& chunk, int64_t token, int64_t stop) {
    kept = &chunk, first = token, count = int(std::min<int64_t>(C, stop - token)), n = padded(count);
    q = args.features ? t.q : chunk.q_to, k = args.features ? t.k : chunk.k_behind;
    k_to = args.features ? chunk.k_to : chunk.k_behind;
  }

  void load(T* tile, const Operand& x, int64_t dims, T scale = 1) {
    for (int i = 0; i < n; ++i) {
      T* row = tile + i * LD;
      const int found = i < count ? int(dims) : 0;
      if (found) load_row(row, x.at(b, first + i, h), x.dim, found, x.dtype);
      if (scale != 1)
        for (int d = 0; d < found; ++d) row[d] *= scale;
      for (int d = found; d < padded(dims); ++d) row[d] = 0;
    }
  }
  void store_tile(const Operand& x, const T* tile, int64_t dims, T scale = 1) {
    for (int i = 0; i < count; ++i) store_row(x.at(b, first + i, h), x.dim, tile + i * LD, scale, int(dims), x.dtype);
  }

  static void copy(T* to, const T* from, int rows, int columns) {
    for (int i = 0; i < rows; ++i)
      for (int d = 0; d < columns; ++d) to[i * LD + d] = from[i * LD + d];
  }
  static void multiply(T* out, const T* x, const T* y, int rows, int columns) {
    for (int i = 0; i < rows; ++i)
      for (int d = 0; d < columns; ++d) out[i * LD + d] = x[i * LD + d] * y[i * LD + d];
  }
  static void by_row(T* out, const T* x, const T* factor, int rows, int columns) {
    for (int i = 0; i < rows; ++i)
      for (int d = 0; d < columns; ++d) out[i * LD + d] = x[i * LD + d] * factor[i];
  }

  // x decayed by `by` [C] or [C, LD]; x itself where nothing decays.
  const T* under(const T* x, const T* by, T* out) {
    if (args.features == 0) return x;
    args.features == 1 ? by_row(out, x, by, n, D) : multiply(out, x, by, n, D);
    return out;
  }

  // Columns of a state [D, V] through the chunk.
  void pass(T* state, int columns) {
    if (args.features)
      for (int d = 0; d < D; ++d)
        for (int v = 0; v < columns; ++v) state[d * LD + v] *= kept->through[d];
  }

  // Scores [n, n] of rows and keys, zeros above the diagonal; strictly below it where `strict`.
  void scores(const T* rows, T* out, bool strict) {
    if (args.features == 2) {
      feature_scores<LD>(rows, k, t.kT, t.a, out, t.side, t.met, t.metT, n, D);
    } else {
      product<Op::set, Shape::lower_c, false, LD, C, C>(rows, t.kT, out, n, n, D);
      if (args.features == 1)
        for (int i = 0; i < n; ++i)
          for (int j = 0; j <= i; ++j) out[i * C + j] *= t.between[i * C + j];
    }
    clear_above(out, strict);
  }
  void clear_above(T* x, bool strict) {
    for (int i = 0; i < n; ++i)
      for (int j = strict ? i : i + 1; j < n; ++j) x[i * C + j] = 0;
  }

  // Keys, values, decays and the delta rule's system.
  void take() {
    load(k, args.k, args.D);
    load(t.v, args.v, args.V);
    if (args.features == 1) {
      for (int i = 0; i < n; ++i) {
        t.a[i] = 0;
        if (i < count) load_row(t.a + i, args.g.at(b, first + i, h), 1, 1, args.g.dtype);
      }
      decay_exp(t.a, n);
      head_decays(t.a, t.to, t.behind, t.between, n);
      for (int d = 0; d < D; ++d) kept->through[d] = t.to[n - 1];
    } else if (args.features == 2) {
      load(t.a, args.g, args.D);
      for (int i = 0; i < n; ++i) decay_exp(t.a + i * LD, D);
      decays_to<LD>(t.a, t.to, 0, n, D);
      decays_behind<LD>(t.a, t.behind, 0, n, D);
      for (int d = 0; d < D; ++d) kept->through[d] = t.to[(n - 1) * LD + d];
    }
    under(k, t.behind, kept->k_behind);
    if (!delta) return;
    transpose<LD, C>(k, t.kT, n, D);
    under(k, t.to, kept->k_to);
    for (int i = 0; i < n; ++i) {
      kept->beta[i] = 0;
      if (i < count) load_row(kept->beta + i, args.beta.at(b, first + i, h), 1, 1, args.beta.dtype);
    }
    scores(k, t.m, true);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) kept->system[i * C + j] = kept->beta[i] * t.m[i * C + j];
  }
  void take_queries() {
    load(q, args.q, args.D, T(args.scale));
    under(q, t.to, kept->q_to);
  }
  void score_queries() {
    if (!delta) transpose<LD, C>(k, t.kT, n, D);
    scores(q, kept->p, false);
  }

  // left: from V to V - (K A) S
  void leave(const T* s, T* left, int columns) { product<Op::subtract, Shape::full, false, LD, LD, LD>(k_to, s, left, n, columns, D); }

  // u: from V to (I + diag(beta) M)^-1 diag(beta) (V - (K A) S)
  void solve(const T* s, T* u, int columns) {
    leave(s, u, columns);
    by_row(u, u, kept->beta, n, columns);
    for (int at = 0; at < n; at += 16) {
      if (at) product<Op::subtract, Shape::full, false, C, LD, LD>(kept->system + at * C, u, u + at * LD, 16, columns, at);
      for (int i = at + 1; i < at + 16; ++i)
        for (int j = at; j < i; ++j) subtract_row(u + i * LD, u + j * LD, kept->system[i * C + j], columns);
    }
  }
  // x: to (I + diag(beta) M)^-T x
  void solve_transposed(T* x, int columns) {
    for (int at = n - 16; at >= 0; at -= 16) {
      const int behind = at + 16;
      if (behind < n)
        product<Op::subtract, Shape::full, true, C, LD, LD>(kept->system + behind * C + at, x + behind * LD, x + at * LD, 16, columns,
                                                           n - behind);
      for (int i = behind - 1; i > at; --i)
        for (int j = at; j < i; ++j) subtract_row(x + j * LD, x + i * LD, kept->system[i * C + j], columns);
    }
  }
  void subtract_row(T* x, const T* y, T factor, int columns) {
    for (int v = 0; v < columns; ++v) x[v] -= factor * y[v];
  }

  // s: from the chunk's entry to its exit, diag(A_c) S + (K Z)^T U
  void step(T* s, const T* u, int columns) {
    pass(s, columns);
    product<Op::add, Shape::full, true, LD, LD, LD>(kept->k_behind, u, s, D, columns, n);
  }

  // ds: from the chunk's exit to its entry; du: dU, by the delta rule (I + diag(beta) M)^-T dU
  void step_back(T* ds, T* du, const T* dout, int columns) {
    product<Op::set, Shape::full, false, LD, LD, LD>(kept->k_behind, ds, du, n, columns, D);
    product<Op::add, Shape::upper_a, true, C, LD, LD>(kept->p, dout, du, n, columns, n);
    pass(ds, columns);
    product<Op::add, Shape::full, true, LD, LD, LD>(kept->q_to, dout, ds, D, columns, n);
    if (!delta) return;
    solve_transposed(du, columns);
    negative_values(du, columns);
    product<Op::add, Shape::full, true, LD, LD, LD>(k_to, t.dx, ds, D, columns, n);
  }
  void negative_values(const T* du, int columns) {  // t.dx: -dV of the delta rule
    for (int i = 0; i < n; ++i) t.sums[i] = -kept->beta[i];
    by_row(t.dx, du, t.sums, n, columns);
  }

  void output(const T* s, const T* u) {
    product<Op::set, Shape::full, false, LD, LD, LD>(kept->q_to, s, t.dout, n, V, D);
    product<Op::add, Shape::lower_a, false, C, LD, LD>(kept->p, u, t.dout, n, V, n);
    store_tile(args.out, t.dout, args.V);
  }

  // What the adjoint of the state at the exit gives, which `step_back` takes on.
  void leave_exit(const T* s, const T* ds, const T* u) {
    transpose<LD, LD>(ds, t.dsT, D, V);
    product<Op::set, Shape::full, false, LD, LD, LD>(u, t.dsT, t.dk_behind, n, D, V);
    if (args.features)
      for (int d = 0; d < D; ++d) t.dthrough[d] = kept->through[d] * dot(s + d * LD, ds + d * LD, V);
  }

  // The chunk's gradients, of t.dout and of `du` as `step_back` leaves it.
  void gradients(const T* s, const T* u, const T* du) {
    transpose<LD, C>(u, t.uT, n, V);
    transpose<LD, LD>(s, t.sT, D, V);
    product<Op::set, Shape::full, false, LD, LD, LD>(t.dout, t.sT, t.dq_to, n, D, V);
    product<Op::set, Shape::lower_c, false, LD, C, C>(t.dout, t.uT, t.dp, n, n, V);
    clear_above(t.dp, false);
    if (delta) {
      copy(t.dx, t.v, n, V);
      leave(s, t.dx, V);
      product<Op::subtract, Shape::lower_a, false, C, LD, LD>(t.m, u, t.dx, n, V, n);
      for (int i = 0; i < n; ++i) t.sums[i] = dot(du + i * LD, t.dx + i * LD, V);
      for (int i = 0; i < count; ++i) store_row(args.dbeta.at(b, first + i, h), 1, t.sums + i, T(1), 1, args.dbeta.dtype);
      negative_values(du, V);
      store_tile(args.dv, t.dx, args.V, T(-1));
      product<Op::set, Shape::full, false, LD, LD, LD>(t.dx, t.sT, t.dk_to, n, D, V);
      product<Op::set, Shape::lower_c, false, LD, C, C>(t.dx, t.uT, t.dm, n, n, V);
      clear_above(t.dm, true);
    } else {
      store_tile(args.dv, du, args.V);
    }
    keys_and_queries();
  }

  // Adds to drows, t.dk and t.dg what the gradient of `found`, the scores of rows and keys, makes of it.
  void scores_vjp(const T* dscores, const T* found, const T* rows, T* drows) {
    if (args.features == 2) {
      feature_scores_vjp<LD>(dscores, rows, k, t.a, drows, t.dk, t.dg, t.side, t.met, t.dmet, n, D);
      return;
    }
    if (args.features == 1) {
      head_scores_vjp(dscores, found, t.dg, t.sums, t.ones, n);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) t.raw[i * C + j] = dscores[i * C + j] * t.between[i * C + j];
      dscores = t.raw;
    }
    product<Op::add, Shape::lower_a, false, C, LD, LD>(dscores, k, drows, n, D, n);
    product<Op::add, Shape::upper_a, true, C, LD, LD>(dscores, rows, t.dk, n, D, n);
  }

  // t.dg_m: everything that is decayed from the entry past m, through the chunk, and from before m to the end.
  void decays_vjp() {
    const T *q_to = kept->q_to, *k_behind = kept->k_behind;
    if (args.features == 1) {
      T past = 0, ahead = 0;
      for (int d = 0; d < D; ++d) past += t.dthrough[d];
      for (int i = n - 1; i >= 0; --i) {
        past += dot(t.dq_to + i * LD, q_to + i * LD, D);
        if (delta) past += dot(t.dk_to + i * LD, k_to + i * LD, D);
        t.dg[i] = past;
      }
      for (int i = 0; i < n; ++i) t.dg[i] += ahead, ahead += dot(t.dk_behind + i * LD, k_behind + i * LD, D);
      return;
    }
    for (int d = 0; d < D; ++d) t.row[d] = t.dthrough[d];
    for (int i = n - 1; i >= 0; --i)
      for (int d = 0; d < D; ++d) {
        t.row[d] += t.dq_to[i * LD + d] * q_to[i * LD + d];
        if (delta) t.row[d] += t.dk_to[i * LD + d] * k_to[i * LD + d];
        t.dg[i * LD + d] = t.row[d];
      }
    for (int d = 0; d < D; ++d) t.row[d] = 0;
    for (int i = 0; i < n; ++i)
      for (int d = 0; d < D; ++d) t.dg[i * LD + d] += t.row[d], t.row[d] += t.dk_behind[i * LD + d] * k_behind[i * LD + d];
  }

  // dQ, dK and dG from the gradients of decayed queries and keys and of the scores.
  void keys_and_queries() {
    if (args.features) decays_vjp();
    const T *from_q = under(t.dq_to, t.to, t.dq_to), *from_k = under(t.dk_behind, t.behind, t.dk_behind);
    const T* also_k = delta ? under(t.dk_to, t.to, t.dk_to) : nullptr;
    for (int i = 0; i < n; ++i)
      for (int d = 0; d < D; ++d) {
        t.dq[i * LD + d] = from_q[i * LD + d];
        t.dk[i * LD + d] = from_k[i * LD + d] + (also_k ? also_k[i * LD + d] : T(0));
      }
    scores_vjp(t.dp, kept->p, q, t.dq);
    if (delta) scores_vjp(t.dm, t.m, k, t.dk);
    store_tile(args.dq, t.dq, args.D, T(args.scale));
    store_tile(args.dk, t.dk, args.D);
    if (args.dg.data && args.features == 2) store_tile(args.dg, t.dg, args.D);
    if (args.dg.data && args.features == 1)
      for (int i = 0; i < count; ++i) store_row(args.dg.at(b, first + i, h), 1, t.dg + i, T(1), 1, args.dg.dtype);
  }
};

}  // namespace LT_ISA
}  // namespace longtrain
