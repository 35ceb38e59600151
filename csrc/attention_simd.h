// Vectors by the compiler's vector extension, as wide as this object's instruction set; exp2, tanh, and conversions.
// Included once per instruction set, inside namespace longtrain::LT_ISA, so that nothing is shared between objects.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "attention_args.h"

#if defined(__AVX512F__)
#define LT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LT_VECTOR_BYTES 32
#else
#define LT_VECTOR_BYTES 16
#endif

namespace longtrain {
namespace LT_ISA {

typedef float vfloat __attribute__((vector_size(LT_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(LT_VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(LT_VECTOR_BYTES)));
typedef uint32_t vuint32 __attribute__((vector_size(LT_VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(LT_VECTOR_BYTES)));

template <class T> struct Simd;
template <> struct Simd<float> {
  using V = vfloat;
  using I = vint32;
  using Int = int32_t;
};
template <> struct Simd<double> {
  using V = vdouble;
  using I = vint64;
  using Int = int64_t;
};
template <class T> constexpr int lanes = LT_VECTOR_BYTES / int(sizeof(T));

template <class V, class T> static inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T> static inline void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
template <class V, class T> static inline V splat(T x) {
  V v;
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) v[i] = x;
  return v;
}
template <class T> static inline typename Simd<T>::I lane_index() {
  typename Simd<T>::I v;
  for (int i = 0; i < lanes<T>; ++i) v[i] = i;
  return v;
}

// 2^r on [-1/2, 1/2], float: minimax polynomial of degree 6, relative error 2e-9 (Lawson-weighted least squares).
static inline vfloat exp2_fraction(vfloat r) {
  vfloat p = r * 1.5345812032e-4f + 1.3399931362e-3f;
  p = p * r + 9.6184889582e-3f;
  p = p * r + 5.5503287766e-2f;
  p = p * r + 2.4022646891e-1f;
  p = p * r + 6.9314720574e-1f;
  return p * r + 1.f;
}

// 2^x. NaN stays NaN; far below -126 it is 0, of -inf exactly so.
#if defined(__AVX512F__)
static inline vfloat exp2v(vfloat x) {
  const __m512 clipped = _mm512_max_ps(_mm512_set1_ps(-160.f), (__m512)x); // the second operand when either is NaN
  const __m512 n = _mm512_roundscale_ps(clipped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vfloat)_mm512_scalef_ps((__m512)exp2_fraction((vfloat)clipped - (vfloat)n), n);
}
#else
static inline vfloat exp2v(vfloat x) {
  const vfloat zero = {};
  vfloat clipped = x < -127.f ? zero - 127.f : x;
  clipped = clipped > 128.f ? zero + 128.f : clipped;
  const vfloat shifted = clipped + 12582912.f; // 1.5 * 2^23: the integer part lands in the low bits
  const vint32 exponent = ((vint32)shifted - 0x4B400000 + 127) << 23;
  const vfloat y = exp2_fraction(clipped - (shifted - 12582912.f)) * (vfloat)exponent;
  return x < -126.f ? zero : y;
}
#endif

// double: Taylor coefficients ln2^k / k! to degree 13 (truncation 4e-18).
static inline vdouble exp2v(vdouble x) {
  constexpr double ln2 = 0.693147180559945309417232121458;
  const vdouble zero = {};
  vdouble clipped = x < -1022. ? zero - 1022. : x;
  clipped = clipped > 1024. ? zero + 1024. : clipped;
  const vdouble shifted = clipped + 6755399441055744.; // 1.5 * 2^52
  const vdouble t = (clipped - (shifted - 6755399441055744.)) * ln2;
  vdouble p = zero + 1. / 6227020800.;
  constexpr double inverse_factorial[13] = {1., 1., 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320,
                                            1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600};
  for (int k = 12; k >= 0; --k) p = p * t + inverse_factorial[k];
  const vint64 exponent = ((vint64)shifted - 0x4338000000000000LL + 1023) << 52;
  const vdouble y = p * (vdouble)exponent;
  return x < -1022. ? zero : y;
}

// tanh, float: S. Moshier, Cephes tanhf.c: a polynomial below 0.625, else 1 - 2 / (exp(2|x|) + 1).
static inline vfloat tanhv(vfloat x) {
  const vfloat zero = {};
  const vfloat magnitude = x < 0.f ? -x : x;
  const vfloat z = x * x;
  vfloat p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vfloat small = p * z * x + x;
  const vfloat clipped = magnitude > 20.f ? zero + 20.f : magnitude;
  const vfloat large = 1.f - 2.f / (exp2v(clipped * 2.88539008177792681f) + 1.f);
  return magnitude < 0.625f ? small : (x < 0.f ? -large : large);
}
static inline vdouble tanhv(vdouble x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// The dropout hash of mask.py.
template <class U> static inline U mix32(U x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// 1 / (1 - p) where kept, 0 where dropped, for one key position and a vector of queries with row keys a, b.
static inline vfloat keep_factor(const uint32_t* a, const uint32_t* b, uint32_t key, uint32_t threshold, float kept) {
  const vuint32 u = mix32<vuint32>(load<vuint32>(a) * key + load<vuint32>(b));
  const vfloat zero = {};
  return u >= threshold ? zero + kept : zero;
}
static inline vdouble keep_factor(const uint32_t* a, const uint32_t* b, uint32_t key, uint32_t threshold, double kept) {
  vdouble v;
  for (int i = 0; i < lanes<double>; ++i) v[i] = mix32<uint32_t>(a[i] * key + b[i]) >= threshold ? kept : 0.;
  return v;
}

static inline float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return 0x7FC0;
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16); // nearest, ties to even
}
#if defined(__F16C__)
static inline float from_f16(uint16_t h) { return _cvtsh_ss(h); }
static inline uint16_t to_f16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
static inline float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  float f;
  if (exponent == 0) {
    f = std::ldexp(float(fraction), -24);
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | (fraction << 13);
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline uint16_t to_f16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const float magnitude = std::fabs(f);
  if (f != f) return sign | 0x7E00;
  if (magnitude >= 65520.f) return sign | 0x7C00;
  if (magnitude < 0x1p-14f) return sign | uint16_t(std::nearbyint(magnitude * 0x1p24f));
  bits &= 0x7FFFFFFF;
  bits += 0xFFF + ((bits >> 13) & 1);
  return sign | uint16_t((bits - (112u << 23)) >> 13);
}
#endif

// A row of n elements of `dtype`, `step` apart, to T and back.
template <class T> static inline void load_row(T* dst, const char* src, int64_t step, int n, DType dtype) {
  switch (dtype) {
    case DType::f64:
      for (int i = 0; i < n; ++i) dst[i] = T(reinterpret_cast<const double*>(src)[i * step]);
      return;
    case DType::f32: {
      const float* p = reinterpret_cast<const float*>(src);
      if (step == 1)
        for (int i = 0; i < n; ++i) dst[i] = T(p[i]);
      else
        for (int i = 0; i < n; ++i) dst[i] = T(p[i * step]);
      return;
    }
    case DType::bf16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(src);
      if (step == 1)
        for (int i = 0; i < n; ++i) dst[i] = T(from_bf16(p[i]));
      else
        for (int i = 0; i < n; ++i) dst[i] = T(from_bf16(p[i * step]));
      return;
    }
    case DType::f16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(src);
      int i = 0;
#if defined(__F16C__)
      if (step == 1 && sizeof(T) == 4)
        for (; i + 8 <= n; i += 8) {
          const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
          std::memcpy(dst + i, &eight, sizeof(eight));
        }
#endif
      for (; i < n; ++i) dst[i] = T(from_f16(p[i * step]));
      return;
    }
  }
}

template <class T> static inline void store_row(char* dst, int64_t step, const T* src, T factor, int n, DType dtype) {
  switch (dtype) {
    case DType::f64:
      for (int i = 0; i < n; ++i) reinterpret_cast<double*>(dst)[i * step] = double(src[i] * factor);
      return;
    case DType::f32:
      for (int i = 0; i < n; ++i) reinterpret_cast<float*>(dst)[i * step] = float(src[i] * factor);
      return;
    case DType::bf16:
      for (int i = 0; i < n; ++i) reinterpret_cast<uint16_t*>(dst)[i * step] = to_bf16(float(src[i] * factor));
      return;
    case DType::f16:
      for (int i = 0; i < n; ++i) reinterpret_cast<uint16_t*>(dst)[i * step] = to_f16(float(src[i] * factor));
      return;
  }
}

static inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

} // namespace LT_ISA
} // namespace longtrain
