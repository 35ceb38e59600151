// Constants of the transforms in long_conv_fft.h, computed in double. Compiled once, for every instruction set.
#pragma once
#include <cmath>
#include <complex>
#include <numbers>
#include <vector>

#include "long_conv_args.h"

namespace longtrain {

// exp(2 pi i e / n) for any e in [0, n), by a product of two short tables.
class Circle {
 public:
  explicit Circle(int64_t n) {
    while ((int64_t(1) << (2 * bits_)) < n) ++bits_;
    const int64_t coarse = (n >> bits_) + 1;
    for (int64_t i = 0; i < (int64_t(1) << bits_); ++i) fine_.push_back(std::polar(1., 2 * std::numbers::pi * double(i) / double(n)));
    for (int64_t i = 0; i < coarse; ++i) coarse_.push_back(std::polar(1., 2 * std::numbers::pi * double(i << bits_) / double(n)));
  }
  std::complex<double> operator()(int64_t e) const {
    const auto a = coarse_[e >> bits_], b = fine_[e & ((int64_t(1) << bits_) - 1)];
    return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
  }

 private:
  int bits_ = 0;
  std::vector<std::complex<double>> fine_, coarse_;
};

template <class T> struct TransformTables {
  std::vector<T> weight, roots, odd_twist, odd_circle;
  std::vector<T> twist;

  TransformTables(int64_t size, int64_t odd, int64_t lanes) {
    using std::numbers::pi;
    const int64_t inner = size / lanes, power = inner / odd;
    for (int64_t l = 0; l < lanes; ++l) {
      weight.push_back(T(std::cos(pi * double(l) / double(2 * lanes))));
      weight.push_back(T(std::sin(pi * double(l) / double(2 * lanes))));
    }
    const Circle circle(4 * size);
    twist.resize(2 * size);
    for (int64_t i = 0; i < inner; ++i)
      for (int64_t m = 0; m < lanes; ++m) {
        const auto z = circle(i * (4 * m + 1));  // i < inner and 4 m + 1 < 4 lanes: less than 4 size
        twist[2 * lanes * i + m] = T(z.real()), twist[2 * lanes * i + lanes + m] = T(z.imag());
      }
    for (int64_t p = 1; p < odd; ++p)
      for (int64_t i = 0; i < power; ++i) {
        const double angle = 2 * pi * double(p * i) / double(inner);
        odd_twist.push_back(T(std::cos(angle))), odd_twist.push_back(T(std::sin(angle)));
      }
    for (int64_t p = 0; p < odd; ++p) {
      const double angle = 2 * pi * double(p) / double(odd);
      odd_circle.push_back(T(std::cos(angle))), odd_circle.push_back(T(std::sin(angle)));
    }
    // angle[b] of block b's root: angle[2 b + m] = angle[b] / 2 + m pi.
    const int64_t blocks = std::max<int64_t>(1, power / 4);
    std::vector<double> angle(blocks, 0.);
    for (int64_t b = 1; b < blocks; ++b) angle[b] = angle[b / 2] / 2 + double(b % 2) * pi;
    for (int64_t b = 0; b < blocks; ++b)
      for (int q = 1; q <= 3; ++q) roots.push_back(T(std::cos(q * angle[b] / 4))), roots.push_back(T(std::sin(q * angle[b] / 4)));
  }

  Tables view() const { return {weight.data(), twist.data(), roots.data(), odd_twist.data(), odd_circle.data()}; }
};

}  // namespace longtrain
