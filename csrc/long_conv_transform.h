// A group of channels through the transform: forward y = F^-1(F v F k); backward dv = F^-1(F g conj F k), dk = F^-1(sum of F g conj F v).
#pragma once
#include "long_conv_filter.h"
#include "long_conv_rows.h"
#include "long_conv_tree.h"

namespace longtrain {
namespace LT_ISA {

template <class T, class S> struct TransformGroup {
  const LongConvArgs& a;
  const Transform<T> t;
  const int64_t number, group, stride;
  T *staged, *v, *g, *k, *p;
  int64_t in_slot[16];  // the filter whose values a slot of k holds

  // Workspace of workspace_elements().
  TransformGroup(const LongConvArgs& args, int64_t number_, T* workspace, bool backward)
      : a(args), t(args), number(number_), group(args.group), stride(channel_stride(args.size, lanes<T>)) {
    staged = workspace;
    v = staged + 2 * lanes<T> * kRunElements;
    g = v + group * stride;
    k = backward ? g + group * stride : g;
    p = k + a.k_slots * stride;
    std::fill_n(in_slot, 16, int64_t(-1));
  }

  int width() const { return int(std::min(group, a.E - number * group)); }
  int64_t filter(int c) const { return (number * group + c) / a.share; }
  int slot(int c, int64_t slots) const { return slots == 1 ? 0 : int(filter(c) - filter(0)); }

  bool filter_is_real() const { return a.past <= t.size && a.future == 0; }

  const T* filter_values(int c) {
    const int at = slot(c, a.k_slots);
    T* values = k + at * stride;
    if (in_slot[at] != filter(c)) {
      const LaidFilter<T> laid{a, filter(c), T(1) / T(t.size)};
      filter_is_real() ? enter<T, true>(t, 1, values, stride, staged, laid) : enter<T, false>(t, 1, values, stride, staged, laid);
      forward_inner(t, values);
      in_slot[at] = filter(c);
    }
    return values;
  }

  void read(T* z, const Rows& x, const Rows& gate, int64_t b, int64_t frame, int64_t start, int64_t stop) {
    const Columns columns{b, number * group, width()};
    const auto fill = [&](T* dst, int64_t j, int64_t n) { read_rows<T, S>(dst, group, x, gate, columns, frame + j, n, start, stop); };
    stop - frame <= t.size ? enter<T, true>(t, group, z, stride, staged, fill) : enter<T, false>(t, group, z, stride, staged, fill);
  }

  template <class Drain> void write(const T* z, int64_t frame, int64_t stop, const Drain& drain) {
    const auto by_token = [&](const T* src, int64_t j, int64_t n) { drain(src, frame + j, n); };
    stop - frame <= t.size ? leave<T, true>(t, group, z, stride, staged, by_token) : leave<T, false>(t, group, z, stride, staged, by_token);
  }

  // out = factor * (k * v + skip v), from v in the buffer `from`.
  void mixed(const T* from, T* to, const Piece& piece, int64_t b, const Rows& factor, const Rows& out) {
    for (int c = 0; c < width(); ++c) {
      T* z = to + c * stride;
      const T* values = filter_values(c);
      if (from != to) std::memcpy(z, from + c * stride, sizeof(T) * 2 * t.size);
      multiply<T, false>(z, values, t.inner);
      inverse_inner(t, z);
    }
    const Columns columns{b, number * group, width()};
    write(to, piece.v_frame, piece.out_stop, [&](const T* src, int64_t t0, int64_t n) {
      write_mixed<T, S>(a, src, group, factor, out, columns, t0, n, piece.out_start, piece.out_stop);
    });
  }

  void forward() {
    for (const Piece* piece = a.pieces; piece < a.pieces + a.n_pieces; ++piece)
      for (int64_t b = 0; b < a.B; ++b) {
        read(v, a.u, a.gate_in, b, piece->v_frame, piece->v_start, piece->v_stop);
        for (int c = 0; c < width(); ++c) forward_inner(t, v + c * stride);
        mixed(v, v, *piece, b, a.gate_out, a.y);
      }
  }

  void backward() {
    double dskip[16] = {};
    const int64_t items = a.n_pieces * a.B;
    const bool want_dv = a.du.data || a.dgate_in.data;
    int64_t item = 0;
    for (const Piece* piece = a.pieces; piece < a.pieces + a.n_pieces; ++piece)
      for (int64_t b = 0; b < a.B; ++b, ++item) {
        const Columns columns{b, number * group, width()};
        bool have_v = false;
        if (a.dgate_out.data) {
          read(v, a.u, a.gate_in, b, piece->v_frame, piece->v_start, piece->v_stop);
          for (int c = 0; c < width(); ++c) forward_inner(t, v + c * stride);
          mixed(v, g, *piece, b, a.dy, a.dgate_out);
          have_v = piece->v_frame == piece->g_frame && piece->v_start == piece->out_start && piece->v_stop == piece->out_stop;
        }
        if (a.dk && !have_v) {
          read(v, a.u, a.gate_in, b, piece->g_frame, piece->out_start, piece->out_stop);
          for (int c = 0; c < width(); ++c) forward_inner(t, v + c * stride);
        }
        if (a.dk || want_dv) {
          read(g, a.dy, a.gate_out, b, piece->g_frame, piece->g_start, piece->g_stop);
          for (int c = 0; c < width(); ++c) {
            T* z = g + c * stride;
            forward_inner(t, z);
            if (a.dk) add_to_filter(c, z, item == 0, item + 1 == items);
            if (want_dv) {
              multiply<T, true>(z, filter_values(c), t.inner);
              inverse_inner(t, z);
            }
          }
        }
        const auto write_gradients = [&](const T* src, int64_t t0, int64_t n) {
          write_dv<T, S>(a, src, group, dskip, columns, t0, n, piece->out_start, piece->out_stop);
        };
        if (want_dv)
          write(g, piece->g_frame, piece->out_stop, write_gradients);
        else if (a.dskip)
          for (int64_t t0 = piece->out_start; t0 < piece->out_stop; t0 += kDirectTokens) write_gradients(nullptr, t0, kDirectTokens);
      }
    if (a.dskip)
      for (int c = 0; c < width(); ++c) {
        T& sum = static_cast<T*>(a.dskip)[number * group + c];
        sum = T((a.first ? 0. : double(sum)) + dskip[c]);
      }
  }

  // Sums g conj(v) over the channels of a filter and over all pieces; the last one goes back and into dk.
  void add_to_filter(int c, const T* z, bool first_item, bool last_item) {
    T *values = v + c * stride, *sum = a.dk_slots ? p + slot(c, a.dk_slots) * stride : values;
    const bool first_channel = c == 0 || filter(c) != filter(c - 1), last_channel = c + 1 == width() || filter(c + 1) != filter(c);
    if (sum == values || (first_item && first_channel))
      correlate<T, false>(sum, z, values, t.inner);
    else
      correlate<T, true>(sum, z, values, t.inner);
    if (!last_item || !last_channel) return;
    inverse_inner(t, sum);
    const FilterGradient<T> gradient(a, filter(c), number);
    const T scale = T(1) / T(t.size);
    const int64_t future = 2 * t.size - a.future;
    const auto drain = [&](const T* src, int64_t j, int64_t n) {
      if (j < a.past) gradient.add(j, src, std::min(n, a.past - j), scale);
      const int64_t before = std::max<int64_t>(future - j, 0);
      if (before < n) gradient.add(j + before - (2 * t.size - a.W), src + before, n - before, -scale);
    };
    filter_is_real() ? leave<T, true>(t, 1, sum, stride, staged, drain) : leave<T, false>(t, 1, sum, stride, staged, drain);
  }
};

}  // namespace LT_ISA
}  // namespace longtrain
