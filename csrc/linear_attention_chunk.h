// One head of one row of the batch, chunk after chunk; formulas and names as in longtrain/ops/linear_attention/chunked.py. A chunk's tiles
// are padded with zeros to multiples of 16; systems of the delta rule are solved by substitution in blocks of 16 tokens.
#pragma once
#include "linear_attention_args.h"
#include "linear_attention_decay.h"

namespace longtrain {
namespace LT_ISA {

static inline int padded(int64_t n) { return int((n + 15) / 16 * 16); }

// What a thread holds: tiles of tokens [C, LD], transposed ones [LD, C], scores [C, C], states [LD, LD].
template <class T, int LD> struct alignas(64) Tiles {
  T q[C * LD], k[C * LD], v[C * LD], dout[C * LD], q_to[C * LD], k_to[C * LD], k_behind[C * LD], u[C * LD];
  T a[C * LD], to[C * LD], behind[C * LD], side[C * LD], met[C * LD], dmet[C * LD];
  T du[C * LD], dx[C * LD], dq[C * LD], dk[C * LD], dg[C * LD], dq_to[C * LD], dk_to[C * LD], dk_behind[C * LD];
  T kT[LD * C], uT[LD * C], metT[LD * C];
  T p[C * C], m[C * C], system[C * C], between[C * C], dp[C * C], dm[C * C], raw[C * C];
  T s[LD * LD], sT[LD * LD], ds[LD * LD], dsT[LD * LD];
  T beta[C], through[LD], dthrough[LD], sums[C], ones[C], row[LD];
};

template <class T, int LD> struct LinearHead {
  const LinearArgs& args;
  Tiles<T, LD>& t;
  T* states;  // of a piece's chunks [chunks, LD, LD]
  T* us;      // [piece tokens, LD], by the delta rule
  const int64_t b, h;
  const int D, V;
  const bool delta;
  int n = 0;  // tokens of the chunk, padded

  LinearHead(const LinearArgs& args, char* workspace, int64_t head)
      : args(args), t(*reinterpret_cast<Tiles<T, LD>*>(workspace)), states(reinterpret_cast<T*>(workspace + sizeof(Tiles<T, LD>))),
        us(states + (args.piece + C - 1) / C * LD * LD), b(head / args.H), h(head % args.H), D(padded(args.D)), V(padded(args.V)),
        delta(args.beta.data) {}

  static int64_t workspace(const LinearArgs& args) {
    const int64_t chunks = (args.piece + C - 1) / C;
    return int64_t(sizeof(Tiles<T, LD>)) + chunks * LD * (LD + C) * int64_t(sizeof(T));
  }

  void load(T* tile, const Operand& x, int64_t first, int count, int64_t dims, T scale = 1) {
    for (int i = 0; i < n; ++i) {
      T* row = tile + i * LD;
      const int found = i < count ? int(dims) : 0;
      if (found) load_row(row, x.at(b, first + i, h), x.dim, found, x.dtype);
      if (scale != 1)
        for (int d = 0; d < found; ++d) row[d] *= scale;
      for (int d = found; d < padded(dims); ++d) row[d] = 0;
    }
  }

  void store_tile(const Operand& x, const T* tile, int64_t first, int count, int64_t dims, T scale = 1) {
    for (int i = 0; i < count; ++i) store_row(x.at(b, first + i, h), x.dim, tile + i * LD, scale, int(dims), x.dtype);
  }

  // Rows of a contiguous [.., D, V] and a tile [LD, LD].
  void load_state(T* tile, const char* from, int64_t index) {
    const T* src = reinterpret_cast<const T*>(from) + index * args.D * args.V;
    for (int d = 0; d < D; ++d)
      for (int v = 0; v < V; ++v) tile[d * LD + v] = d < args.D && v < args.V ? src[d * args.V + v] : T(0);
  }
  void store_state(char* to, int64_t index, const T* tile) {
    T* dst = reinterpret_cast<T*>(to) + index * args.D * args.V;
    for (int64_t d = 0; d < args.D; ++d)
      for (int64_t v = 0; v < args.V; ++v) dst[d * args.V + v] = tile[d * LD + v];
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

  // state [D, V] through the chunk.
  void pass(T* state) {
    if (args.features)
      for (int d = 0; d < D; ++d)
        for (int v = 0; v < V; ++v) state[d * LD + v] *= t.through[d];
  }

  // Scores [n, n] of rows and keys, zeros above the diagonal; strictly below it where `strict`.
  void scores(const T* rows, T* out, bool strict) {
    if (args.features == 2) {
      feature_scores<LD>(rows, t.k, t.kT, t.a, out, t.side, t.met, t.metT, n, D);
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

  // Keys, values, decays and the delta rule's system of a chunk.
  const T *q_to, *k_to, *k_behind;
  void take(int64_t first, int count) {
    n = padded(count);
    load(t.k, args.k, first, count, args.D);
    load(t.v, args.v, first, count, args.V);
    if (args.features == 1) {
      for (int i = 0; i < n; ++i) {
        t.a[i] = 0;
        if (i < count) load_row(t.a + i, args.g.at(b, first + i, h), 1, 1, args.g.dtype);
      }
      decay_exp(t.a, n);
      head_decays(t.a, t.to, t.behind, t.between, n);
      for (int d = 0; d < D; ++d) t.through[d] = t.to[n - 1];
    } else if (args.features == 2) {
      load(t.a, args.g, first, count, args.D);
      for (int i = 0; i < n; ++i) decay_exp(t.a + i * LD, D);
      decays_to<LD>(t.a, t.to, 0, n, D);
      decays_behind<LD>(t.a, t.behind, 0, n, D);
      for (int d = 0; d < D; ++d) t.through[d] = t.to[(n - 1) * LD + d];
    }
    k_behind = under(t.k, t.behind, t.k_behind);
    if (!delta) return;
    transpose<LD, C>(t.k, t.kT, n, D);
    k_to = under(t.k, t.to, t.k_to);
    for (int i = 0; i < n; ++i) {
      t.beta[i] = 0;
      if (i < count) load_row(t.beta + i, args.beta.at(b, first + i, h), 1, 1, args.beta.dtype);
    }
    scores(t.k, t.m, true);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) t.system[i * C + j] = t.beta[i] * t.m[i * C + j];
  }
  void take_queries(int64_t first, int count) {
    load(t.q, args.q, first, count, args.D, T(args.scale));
    if (!delta) transpose<LD, C>(t.k, t.kT, n, D);
    q_to = under(t.q, t.to, t.q_to);
    scores(t.q, t.p, false);
  }

  // left = V - (K A) S
  void left_of(const T* s, T* left) {
    for (int i = 0; i < n; ++i)
      for (int v = 0; v < V; ++v) left[i * LD + v] = t.v[i * LD + v];
    product<Op::subtract, Shape::full, false, LD, LD, LD>(k_to, s, left, n, V, D);
  }

  // u = (I + diag(beta) M)^-1 diag(beta) (V - (K A) S)
  void solve(const T* s, T* u) {
    left_of(s, u);
    by_row(u, u, t.beta, n, V);
    for (int first = 0; first < n; first += 16) {
      if (first) product<Op::subtract, Shape::full, false, C, LD, LD>(t.system + first * C, u, u + first * LD, 16, V, first);
      for (int i = first + 1; i < first + 16; ++i)
        for (int j = first; j < i; ++j) subtract_row(u + i * LD, u + j * LD, t.system[i * C + j]);
    }
  }
  // x = (I + diag(beta) M)^-T x
  void solve_transposed(T* x) {
    for (int first = n - 16; first >= 0; first -= 16) {
      const int behind = first + 16;
      if (behind < n)
        product<Op::subtract, Shape::full, true, C, LD, LD>(t.system + behind * C + first, x + behind * LD, x + first * LD, 16, V, n - behind);
      for (int i = behind - 1; i > first; --i)
        for (int j = first; j < i; ++j) subtract_row(x + j * LD, x + i * LD, t.system[i * C + j]);
    }
  }
  void subtract_row(T* x, const T* y, T factor) {
    for (int v = 0; v < V; ++v) x[v] -= factor * y[v];
  }

  // The state from the chunk's entry to its exit: s = diag(A_c) S + (K Z)^T U
  void step(T* s, const T* u) {
    pass(s);
    product<Op::add, Shape::full, true, LD, LD, LD>(k_behind, u, s, D, V, n);
  }

  void forward() {
    const int64_t head = b * args.H + h;
    load_state(t.s, args.state, head);
    for (int64_t first = 0, p = 0; first < args.T; first += args.piece, ++p) {
      store_state(args.entries, (b * args.pieces() + p) * args.H + h, t.s);
      const int64_t stop = std::min(args.T, first + args.piece);
      for (int64_t at = first; at < stop; at += C) {
        const int count = int(std::min<int64_t>(C, stop - at));
        take(at, count);
        take_queries(at, count);
        if (delta) solve(t.s, t.u);
        const T* u = delta ? t.u : t.v;
        product<Op::set, Shape::full, false, LD, LD, LD>(q_to, t.s, t.dout, n, V, D);
        product<Op::add, Shape::lower_a, false, C, LD, LD>(t.p, u, t.dout, n, V, n);
        store_tile(args.out, t.dout, at, count, args.V);
        step(t.s, u);
      }
    }
    store_state(args.state, head, t.s);
  }

  void backward() {
    const int64_t head = b * args.H + h;
    load_state(t.ds, args.state, head);
    for (int64_t p = args.pieces() - 1; p >= 0; --p) {
      const int64_t first = p * args.piece, stop = std::min(args.T, first + args.piece), chunks = (stop - first + C - 1) / C;
      load_state(states, args.entries, (b * args.pieces() + p) * args.H + h);
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = first + c * C;
        T *s = states + c * LD * LD, *u = delta ? us + c * C * LD : t.v;
        if (!delta && c + 1 == chunks) break;
        take(at, int(std::min<int64_t>(C, stop - at)));
        if (delta) solve(s, u);
        if (c + 1 == chunks) break;
        for (int d = 0; d < D; ++d)
          for (int v = 0; v < V; ++v) s[LD * LD + d * LD + v] = s[d * LD + v];
        step(s + LD * LD, u);
      }
      for (int64_t c = chunks - 1; c >= 0; --c) {
        const int64_t at = first + c * C;
        chunk_backward(at, int(std::min<int64_t>(C, stop - at)), states + c * LD * LD, us + c * C * LD);
      }
    }
    store_state(args.state, head, t.ds);
  }

  // From the adjoint t.ds of the state at the exit to that at the entry; writes the chunk's gradients.
  void chunk_backward(int64_t at, int count, const T* s, const T* u_kept) {
    take(at, count);
    take_queries(at, count);
    load(t.dout, args.dout, at, count, args.V);
    const T* u = delta ? u_kept : t.v;
    transpose<LD, C>(u, t.uT, n, V);
    transpose<LD, LD>(s, t.sT, D, V);
    transpose<LD, LD>(t.ds, t.dsT, D, V);
    product<Op::set, Shape::full, false, LD, LD, LD>(k_behind, t.ds, t.du, n, V, D);
    product<Op::add, Shape::upper_a, true, C, LD, LD>(t.p, t.dout, t.du, n, V, n);
    product<Op::set, Shape::full, false, LD, LD, LD>(t.dout, t.sT, t.dq_to, n, D, V);
    product<Op::set, Shape::lower_c, false, LD, C, C>(t.dout, t.uT, t.dp, n, n, V);
    clear_above(t.dp, false);
    product<Op::set, Shape::full, false, LD, LD, LD>(u, t.dsT, t.dk_behind, n, D, V);
    if (args.features)
      for (int d = 0; d < D; ++d) t.dthrough[d] = t.through[d] * dot(s + d * LD, t.ds + d * LD, V);
    pass(t.ds);
    product<Op::add, Shape::full, true, LD, LD, LD>(q_to, t.dout, t.ds, D, V, n);
    if (delta) {
      solve_transposed(t.du);
      left_of(s, t.dx);
      product<Op::subtract, Shape::lower_a, false, C, LD, LD>(t.m, u, t.dx, n, V, n);
      for (int i = 0; i < n; ++i) t.sums[i] = dot(t.du + i * LD, t.dx + i * LD, V);
      for (int i = 0; i < count; ++i) store_row(args.dbeta.at(b, at + i, h), 1, t.sums + i, T(1), 1, args.dbeta.dtype);
      for (int i = 0; i < n; ++i) t.sums[i] = -t.beta[i];
      by_row(t.dx, t.du, t.sums, n, V);  // -dV
      store_tile(args.dv, t.dx, at, count, args.V, T(-1));
      product<Op::set, Shape::full, false, LD, LD, LD>(t.dx, t.sT, t.dk_to, n, D, V);
      product<Op::set, Shape::lower_c, false, LD, C, C>(t.dx, t.uT, t.dm, n, n, V);
      clear_above(t.dm, true);
      product<Op::add, Shape::full, true, LD, LD, LD>(k_to, t.dx, t.ds, D, V, n);
    } else {
      store_tile(args.dv, t.du, at, count, args.V);
    }
    keys_and_queries(at, count);
  }

  // Adds to drows, t.dk and t.dg what the gradient of `found`, the scores of rows and keys, makes of it.
  void scores_vjp(const T* dscores, const T* found, const T* rows, T* drows) {
    if (args.features == 2) {
      feature_scores_vjp<LD>(dscores, rows, t.k, t.a, drows, t.dk, t.dg, t.side, t.met, t.dmet, n, D);
      return;
    }
    if (args.features == 1) {
      head_scores_vjp(dscores, found, t.dg, t.sums, t.ones, n);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) t.raw[i * C + j] = dscores[i * C + j] * t.between[i * C + j];
      dscores = t.raw;
    }
    product<Op::add, Shape::lower_a, false, C, LD, LD>(dscores, t.k, drows, n, D, n);
    product<Op::add, Shape::upper_a, true, C, LD, LD>(dscores, rows, t.dk, n, D, n);
  }

  // t.dg_m: everything that is decayed from the entry past m, through the chunk, and from before m to the end.
  void decays_vjp() {
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
  void keys_and_queries(int64_t at, int count) {
    if (args.features) decays_vjp();
    const T *from_q = under(t.dq_to, t.to, t.dq_to), *from_k = under(t.dk_behind, t.behind, t.dk_behind);
    const T* also_k = delta ? under(t.dk_to, t.to, t.dk_to) : nullptr;
    for (int i = 0; i < n; ++i)
      for (int d = 0; d < D; ++d) {
        t.dq[i * LD + d] = from_q[i * LD + d];
        t.dk[i * LD + d] = from_k[i * LD + d] + (also_k ? also_k[i * LD + d] : T(0));
      }
    scores_vjp(t.dp, t.p, t.q, t.dq);
    if (delta) scores_vjp(t.dm, t.m, t.k, t.dk);
    store_tile(args.dq, t.dq, at, count, args.D, T(args.scale));
    store_tile(args.dk, t.dk, at, count, args.D);
    if (args.dg.data && args.features == 2) store_tile(args.dg, t.dg, at, count, args.D);
    if (args.dg.data && args.features == 1)
      for (int i = 0; i < count; ++i) store_row(args.dg.at(b, at + i, h), 1, t.dg + i, T(1), 1, args.dg.dtype);
  }
};

}  // namespace LT_ISA
}  // namespace longtrain
