// Rows of channels between the tensors (any dtype, gates applied) and staged tokens [n][group] of T.
#pragma once
#include "attention_simd.h"
#include "long_conv_args.h"

namespace longtrain {
namespace LT_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class T> static inline T widened(double x) { return T(x); }
template <class T> static inline T widened(float x) { return T(x); }
template <class T> static inline T widened(Bf16 x) { return T(from_bf16(x.bits)); }
template <class T> static inline T widened(F16 x) { return T(from_f16(x.bits)); }
template <class S, class T> static inline S narrowed(T x) {
  if constexpr (std::is_same_v<S, Bf16>) return {to_bf16(float(x))};
  else if constexpr (std::is_same_v<S, F16>) return {to_f16(float(x))};
  else return S(x);
}

template <class S, class T> static inline __attribute__((always_inline)) void widen(T* dst, const S* src, int n) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, F16> && std::is_same_v<T, float>) {
    int c = 0;
    for (; c + 8 <= n; c += 8) {
      const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + c)));
      std::memcpy(dst + c, &eight, sizeof(eight));
    }
    for (; c < n; ++c) dst[c] = widened<T>(src[c]);
    return;
  }
#endif
  for (int c = 0; c < n; ++c) dst[c] = widened<T>(src[c]);
}
template <class S, class T> static inline __attribute__((always_inline)) void narrow(S* dst, const T* src, int n) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<S, F16> && std::is_same_v<T, float>) {
    int c = 0;
    for (; c + 8 <= n; c += 8) {
      __m256 eight;
      std::memcpy(&eight, src + c, sizeof(eight));
      const __m128i halves = _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(dst + c, &halves, sizeof(halves));
    }
    for (; c < n; ++c) dst[c] = narrowed<S>(src[c]);
    return;
  }
#endif
  for (int c = 0; c < n; ++c) dst[c] = narrowed<S>(src[c]);
}

// body(n) with n a constant where the group is a full one, so that the loops over its channels are unrolled.
template <class Body> static inline void with_width(int n, const Body& body) {
  switch (n) {
    case 16: return body(std::integral_constant<int, 16>());
    case 8: return body(std::integral_constant<int, 8>());
    case 4: return body(std::integral_constant<int, 4>());
    default: return body(n);
  }
}

// `width` channels from `channel` on, of one row of the batch.
struct Columns {
  int64_t b, channel;
  int width;
};

template <class S> static inline S* row(const Rows& x, const Columns& c, int64_t t) {
  return reinterpret_cast<S*>(x.data + c.b * x.batch + t * x.token) + c.channel;
}

// dst[n][group] = x * gate of tokens t0 .. t0 + n - 1; 0 for those outside [start, stop) and for channels that are not there.
template <class T, class S>
void read_rows(T* dst, int64_t group, const Rows& x, const Rows& gate, const Columns& columns, int64_t t0, int64_t n,
               int64_t start, int64_t stop) {
  const int64_t first = std::clamp<int64_t>(start - t0, 0, n), last = std::clamp<int64_t>(stop - t0, first, n);
  std::memset(dst, 0, sizeof(T) * group * first);
  std::memset(dst + last * group, 0, sizeof(T) * group * (n - last));
  if (columns.width < group) std::memset(dst + first * group, 0, sizeof(T) * group * (last - first));
  with_width(columns.width, [&](auto width) {
    for (int64_t i = first; i < last; ++i) {
      T value[16];
      widen(value, row<const S>(x, columns, t0 + i), width);
      if (gate.data) {
        T factor[16];
        widen(factor, row<const S>(gate, columns, t0 + i), width);
        for (int c = 0; c < width; ++c) value[c] *= factor[c];
      }
      for (int c = 0; c < width; ++c) dst[i * group + c] = value[c];
    }
  });
}

// out = factor * (staged + skip * u * gate_in) of tokens t0 .. t0 + n - 1 within [start, stop). skip null: none.
template <class T, class S>
void write_mixed(const LongConvArgs& a, const T* staged, int64_t group, const Rows& factor, const Rows& out, const Columns& columns,
                 int64_t t0, int64_t n, int64_t start, int64_t stop) {
  const T* skip = a.skip ? static_cast<const T*>(a.skip) + columns.channel : nullptr;
  with_width(columns.width, [&](auto width) {
    for (int64_t t = std::max(t0, start), end = std::min(t0 + n, stop); t < end; ++t) {
      T y[16], x[16];
      for (int c = 0; c < width; ++c) y[c] = staged[(t - t0) * group + c];
      if (skip) {
        T v[16];
        widen(v, row<const S>(a.u, columns, t), width);
        if (a.gate_in.data) {
          widen(x, row<const S>(a.gate_in, columns, t), width);
          for (int c = 0; c < width; ++c) v[c] *= x[c];
        }
        for (int c = 0; c < width; ++c) y[c] += skip[c] * v[c];
      }
      if (factor.data) {
        widen(x, row<const S>(factor, columns, t), width);
        for (int c = 0; c < width; ++c) y[c] *= x[c];
      }
      narrow(row<S>(out, columns, t), y, width);
    }
  });
}

// du, dgate_in from dv = staged + skip * g, g = dy * gate_out, and dskip += sum of g v, by 16 tokens whatever the group; of tokens as
// above. staged null: dskip only.
template <class T, class S>
void write_dv(const LongConvArgs& a, const T* staged, int64_t group, double* dskip, const Columns& columns, int64_t t0, int64_t n,
              int64_t start, int64_t stop) {
  const T* skip = a.skip ? static_cast<const T*>(a.skip) + columns.channel : nullptr;
  with_width(columns.width, [&](auto width) {
    T sum[16] = {};
    for (int64_t t = std::max(t0, start), end = std::min(t0 + n, stop); t < end; ++t) {
      T dv[16] = {}, g[16], u[16] = {}, gate[16] = {}, x[16];
      if (staged)
        for (int c = 0; c < width; ++c) dv[c] = staged[(t - t0) * group + c];
      if (a.gate_in.data) widen(gate, row<const S>(a.gate_in, columns, t), width);
      if (a.dgate_in.data || a.dskip) widen(u, row<const S>(a.u, columns, t), width);
      if (skip) {
        widen(g, row<const S>(a.dy, columns, t), width);
        if (a.gate_out.data) {
          widen(x, row<const S>(a.gate_out, columns, t), width);
          for (int c = 0; c < width; ++c) g[c] *= x[c];
        }
        for (int c = 0; c < width; ++c) dv[c] += skip[c] * g[c];
        if (a.dskip) {
          if (a.gate_in.data)
            for (int c = 0; c < width; ++c) sum[c] += g[c] * (u[c] * gate[c]);
          else
            for (int c = 0; c < width; ++c) sum[c] += g[c] * u[c];
          if ((t - t0) % 16 == 15 || t + 1 == end)
            for (int c = 0; c < width; ++c) dskip[c] += double(sum[c]), sum[c] = 0;
        }
      }
      if (!staged) continue;
      if (a.dgate_in.data) {
        for (int c = 0; c < width; ++c) x[c] = dv[c] * u[c];
        narrow(row<S>(a.dgate_in, columns, t), x, width);
      }
      if (a.du.data) {
        if (a.gate_in.data)
          for (int c = 0; c < width; ++c) dv[c] *= gate[c];
        narrow(row<S>(a.du, columns, t), dv, width);
      }
    }
  });
}

}  // namespace LT_ISA
}  // namespace longtrain
