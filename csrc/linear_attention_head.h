// Heads, chunk after chunk: a whole one, or the tasks of one that threads share (linear_attention_shared.h).
#pragma once
#include "linear_attention_chunk.h"

namespace longtrain {
namespace LT_ISA {

template <class T, int LD> struct LinearHead {
  const LinearArgs& args;
  LinearChunk<T, LD> chunk;
  const int64_t head;
  T* states;  // of a whole head: of a piece's chunks [chunks, LD, LD]
  T* us;      // [piece tokens, LD], by the delta rule

  LinearHead(const LinearArgs& args, char* workspace, int64_t head)
      : args(args), chunk(args, *reinterpret_cast<Tiles<T, LD>*>(workspace), head), head(head),
        states(reinterpret_cast<T*>(workspace + sizeof(Tiles<T, LD>))), us(states + args.chunks_of(0) * LD * LD) {}

  static LinearBytes workspace(const LinearArgs& args) {
    const int64_t tiles = sizeof(Tiles<T, LD>);
    return {tiles + args.chunks_of(0) * LD * (LD + C) * int64_t(sizeof(T)), tiles, int64_t(sizeof(Kept<T, LD>))};
  }

  // Columns `from` on, as many as given, of a contiguous [.., D, V] in a tile [LD, LD].
  void load_state(T* tile, const char* data, int64_t index, int from, int columns) {
    const T* src = reinterpret_cast<const T*>(data) + index * args.D * args.V + from;
    for (int d = 0; d < chunk.D; ++d)
      for (int v = 0; v < columns; ++v) tile[d * LD + v] = d < args.D && from + v < args.V ? src[d * args.V + v] : T(0);
  }
  void store_state(char* data, int64_t index, const T* tile, int from, int columns) {
    T* dst = reinterpret_cast<T*>(data) + index * args.D * args.V + from;
    for (int64_t d = 0; d < args.D; ++d)
      for (int64_t v = 0; v < std::min<int64_t>(columns, args.V - from); ++v) dst[d * args.V + v] = tile[d * LD + v];
  }
  int64_t entry(int64_t p) const { return (chunk.b * args.pieces() + p) * args.H + chunk.h; }

  void forward() {
    Kept<T, LD>& kept = chunk.t.kept;
    load_state(kept.s, args.state, head, 0, chunk.V);
    for (int64_t p = 0; p < args.pieces(); ++p) {
      store_state(args.entries, entry(p), kept.s, 0, chunk.V);
      for (int64_t c = 0; c < args.chunks_of(p); ++c) {
        chunk.at(kept, p * args.piece + c * C, args.stop_of(p));
        chunk.take();
        chunk.take_queries();
        chunk.score_queries();
        const T* u = chunk.t.v;
        if (chunk.delta) u = values(kept.u), chunk.solve(kept.s, kept.u, chunk.V);
        chunk.output(kept.s, u);
        chunk.step(kept.s, u, chunk.V);
      }
    }
    store_state(args.state, head, kept.s, 0, chunk.V);
  }
  T* values(T* u) {
    chunk.copy(u, chunk.t.v, chunk.n, chunk.V);
    return u;
  }

  void backward() {
    Kept<T, LD>& kept = chunk.t.kept;
    load_state(kept.ds, args.state, head, 0, chunk.V);
    for (int64_t p = args.pieces() - 1; p >= 0; --p) {
      const int64_t chunks = args.chunks_of(p);
      const auto state = [&](int64_t c) { return states + c * LD * LD; };
      const auto at = [&](int64_t c) { chunk.at(kept, p * args.piece + c * C, args.stop_of(p)), chunk.take(); };
      load_state(states, args.entries, entry(p), 0, chunk.V);
      for (int64_t c = 0; c < (chunk.delta ? chunks : chunks - 1); ++c) {
        at(c);
        const T* u = chunk.t.v;
        if (chunk.delta) u = values(us + c * C * LD), chunk.solve(state(c), us + c * C * LD, chunk.V);
        if (c + 1 < chunks) chunk.copy(state(c + 1), state(c), chunk.D, chunk.V), chunk.step(state(c + 1), u, chunk.V);
      }
      for (int64_t c = chunks - 1; c >= 0; --c) {
        at(c);
        chunk.take_queries();
        chunk.score_queries();
        chunk.load(chunk.t.dout, args.dout, args.V);
        const T* u = chunk.delta ? us + c * C * LD : chunk.t.v;
        chunk.leave_exit(state(c), kept.ds, u);
        chunk.step_back(kept.ds, kept.du, chunk.t.dout, chunk.V);
        chunk.gradients(state(c), u, kept.du);
      }
    }
    store_state(args.state, head, kept.ds, 0, chunk.V);
  }

  // Tasks of a piece of a shared head, `kept` its chunks: chunk c by itself;
  void before(Kept<T, LD>* kept, int64_t p, int64_t c) {
    at(kept, p, c);
    chunk.take();
    chunk.take_queries();
    chunk.score_queries();
    values(kept[c].u);
  }

  // some columns of the states, and of their adjoints, along the chunks;
  void along(Kept<T, LD>* kept, int64_t p, int from, int columns, bool backward) {
    const int64_t chunks = args.chunks_of(p);
    T *state = chunk.t.kept.s, *adjoint = chunk.t.kept.ds;
    if (backward) {
      load_state(state, args.entries, entry(p), from, columns);
    } else {
      load_state(state, args.state, head, from, columns);
      store_state(args.entries, entry(p), state, from, columns);
    }
    for (int64_t c = 0; c < chunks; ++c) {
      at(kept, p, c);
      chunk.copy(kept[c].s + from, state, chunk.D, columns);
      if (chunk.delta) chunk.solve(state, kept[c].u + from, columns);
      if (!backward || c + 1 < chunks) chunk.step(state, kept[c].u + from, columns);
    }
    if (!backward) return store_state(args.state, head, state, from, columns);
    load_state(adjoint, args.state, head, from, columns);
    Operand dout = args.dout;
    dout.data += from * dout.dim * dout.itemsize;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      at(kept, p, c);
      chunk.copy(kept[c].ds + from, adjoint, chunk.D, columns);
      chunk.load(chunk.t.dout, dout, std::min<int64_t>(columns, args.V - from));
      chunk.step_back(adjoint, kept[c].du + from, chunk.t.dout, columns);
    }
    store_state(args.state, head, adjoint, from, columns);
  }

  // and what follows from the states for chunk c.
  void after(Kept<T, LD>* kept, int64_t p, int64_t c, bool backward) {
    at(kept, p, c);
    if (!backward) return chunk.output(kept[c].s, kept[c].u);
    chunk.take();
    chunk.take_queries();
    chunk.load(chunk.t.dout, args.dout, args.V);
    chunk.leave_exit(kept[c].s, kept[c].ds, kept[c].u);
    chunk.gradients(kept[c].s, kept[c].u, kept[c].du);
  }
  void at(Kept<T, LD>* kept, int64_t p, int64_t c) { chunk.at(kept[c], p * args.piece + c * C, args.stop_of(p)); }
};

}  // namespace LT_ISA
}  // namespace longtrain
