// A group of channels by the definition, for filters of some ten taps: lanes are channels, tokens and taps are blocked in registers.
#pragma once
#include "long_conv_filter.h"
#include "long_conv_rows.h"

namespace longtrain {
namespace LT_ISA {

// out_j = sum over s < taps of h_s x_{j+s}, for kDirectTokens tokens j; all [*][kDirectGroup], x zero-padded to 16 tokens more.
// Sums of 16 taps are summed, so that rounding does not gather over a row of taps.
template <class T> void direct_sum(T* out, const T* x, const T* h, int64_t taps) {
  constexpr int L = lanes<T>, kTokens = 8, kTaps = 4, kSum = 16;
  using V = typename Simd<T>::V;
  for (int lane = 0; lane < kDirectGroup; lane += L)
    for (int64_t j = 0; j < kDirectTokens; j += kTokens) {
      V total[kTokens] = {};
      for (int64_t s0 = 0; s0 < taps; s0 += kSum) {
        V sum[kTokens] = {};
        for (int64_t s = s0; s < std::min(taps, s0 + kSum); s += kTaps) {
          V tap[kTaps];
#pragma GCC unroll 4
          for (int i = 0; i < kTaps; ++i) tap[i] = load<V>(h + (s + i) * kDirectGroup + lane);
#pragma GCC unroll 11
          for (int i = 0; i < kTokens + kTaps - 1; ++i) {
            const V value = load<V>(x + (j + s + i) * kDirectGroup + lane);
#pragma GCC unroll 4
            for (int n = 0; n < kTaps; ++n)
              if (i - n >= 0 && i - n < kTokens) sum[i - n] += tap[n] * value;
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) total[i] += sum[i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) store(out + (j + i) * kDirectGroup + lane, total[i]);
    }
}

// total_s += sum over j < kDirectTokens of v_j g_{j+s}, s < taps (rounded up to 8). Sums of 32 tokens are summed.
template <class T> void direct_correlation(double* total, const T* v, const T* g, int64_t taps) {
  constexpr int L = lanes<T>, kTaps = 8, kSum = 32;
  using V = typename Simd<T>::V;
  for (int lane = 0; lane < kDirectGroup; lane += L)
    for (int64_t s = 0; s < taps; s += kTaps) {
      V all[kTaps] = {};
      for (int64_t j0 = 0; j0 < kDirectTokens; j0 += kSum) {
        V sum[kTaps] = {};
        for (int64_t j = j0; j < j0 + kSum; ++j) {
          const V value = load<V>(v + j * kDirectGroup + lane);
#pragma GCC unroll 8
          for (int i = 0; i < kTaps; ++i) sum[i] += value * load<V>(g + (j + s + i) * kDirectGroup + lane);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTaps; ++i) all[i] += sum[i];
      }
      for (int i = 0; i < kTaps; ++i)
        for (int c = 0; c < L; ++c) total[(s + i) * kDirectGroup + lane + c] += double(all[i][c]);
    }
}

template <class T, class S> struct DirectGroup {
  static constexpr int64_t G = kDirectGroup;
  const LongConvArgs& a;
  const int64_t number, taps, padded;
  T *x, *v, *out, *h;
  double* dh;

  DirectGroup(const LongConvArgs& args, int64_t number_, T* workspace)
      : a(args), number(number_), taps(args.past + args.future), padded((taps + 7) / 8 * 8) {
    x = workspace;
    v = x + (kDirectTokens + padded + 16) * G;
    out = v + kDirectTokens * G;
    h = out + kDirectTokens * G;
    dh = reinterpret_cast<double*>(h + padded * G);
  }

  int width() const { return int(std::min(G, a.E - number * G)); }
  int64_t filter(int c) const { return (number * G + c) / a.share; }

  // h[s][c]: the tap of channel c at lag a.past - 1 - s (forward), or s - a.future (backward).
  void taps_of_channels(bool forward) {
    std::memset(h, 0, sizeof(T) * padded * G);
    for (int c = 0; c < width(); ++c) {
      const LaidFilter<T> laid{a, filter(c), T(1)};
      T* row = out;  // free until something is summed
      for (int64_t s0 = 0; s0 < a.past; s0 += kDirectTokens) {
        const int64_t n = std::min<int64_t>(kDirectTokens, a.past - s0);
        laid.copy(row, s0, n, T(1));
        for (int64_t s = 0; s < n; ++s) h[(forward ? a.past - 1 - s0 - s : s0 + s + a.future) * G + c] = row[s];
      }
      for (int64_t s0 = 0; s0 < a.future; s0 += kDirectTokens) {  // tap W - future + s is lag s - future
        const int64_t n = std::min<int64_t>(kDirectTokens, a.future - s0);
        laid.copy(row, a.W - a.future + s0, n, T(1));
        for (int64_t s = 0; s < n; ++s) h[(forward ? a.past - 1 + a.future - s0 - s : s0 + s) * G + c] = row[s];
      }
    }
  }

  void read(T* dst, const Rows& from, const Rows& gate, const Columns& columns, int64_t t0, int64_t n, int64_t start, int64_t stop) {
    read_rows<T, S>(dst, G, from, gate, columns, t0, n, start, stop);
  }

  void mixed(const Piece& piece, const Columns& columns, const Rows& factor, const Rows& to) {
    read(x, a.u, a.gate_in, columns, piece.v_frame, kDirectTokens + padded + 16, piece.v_start, piece.v_stop);
    direct_sum(out, x, h, taps);
    write_mixed<T, S>(a, out, G, factor, to, columns, piece.out_start, kDirectTokens, piece.out_start, piece.out_stop);
  }

  void forward() {
    taps_of_channels(true);
    for (const Piece* piece = a.pieces; piece < a.pieces + a.n_pieces; ++piece)
      for (int64_t b = 0; b < a.B; ++b) mixed(*piece, {b, number * G, width()}, a.gate_out, a.y);
  }

  void backward() {
    double dskip[16] = {};
    const bool want_dv = a.du.data || a.dgate_in.data;
    if (a.dgate_out.data) {
      taps_of_channels(true);
      for (const Piece* piece = a.pieces; piece < a.pieces + a.n_pieces; ++piece)
        for (int64_t b = 0; b < a.B; ++b) mixed(*piece, {b, number * G, width()}, a.dy, a.dgate_out);
    }
    if (want_dv) taps_of_channels(false);
    if (a.dk) std::fill_n(dh, padded * G, 0.);
    for (const Piece* piece = a.pieces; piece < a.pieces + a.n_pieces; ++piece)
      for (int64_t b = 0; b < a.B; ++b) {
        const Columns columns{b, number * G, width()};
        if (a.dk || want_dv) read(x, a.dy, a.gate_out, columns, piece->g_frame, kDirectTokens + padded + 16, piece->g_start, piece->g_stop);
        if (a.dk) {
          read(v, a.u, a.gate_in, columns, piece->out_start, kDirectTokens, piece->out_start, piece->out_stop);
          direct_correlation(dh, v, x, taps);
        }
        if (want_dv) direct_sum(out, x, h, taps);
        if (want_dv || a.dskip)
          write_dv<T, S>(a, want_dv ? out : nullptr, G, dskip, columns, piece->out_start, kDirectTokens, piece->out_start, piece->out_stop);
      }
    if (a.dskip)
      for (int c = 0; c < width(); ++c) {
        T& sum = static_cast<T*>(a.dskip)[number * G + c];
        sum = T((a.first ? 0. : double(sum)) + dskip[c]);
      }
    if (!a.dk) return;
    for (int c = 0, next; c < width(); c = next) {
      for (next = c + 1; next < width() && filter(next) == filter(c);) ++next;
      const FilterGradient<T> gradient(a, filter(c), number);
      for (int64_t s = 0; s < taps; ++s) {
        double sum = 0;
        for (int i = c; i < next; ++i) sum += dh[s * G + i];
        const T value = T(sum);
        const int64_t lag = s - a.future;
        gradient.add(lag < 0 ? a.W + lag : lag, &value, 1, T(1));
      }
    }
  }
};

}  // namespace LT_ISA
}  // namespace longtrain
