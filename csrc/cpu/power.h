// |x|^q for q > 0, in a form that compilers vectorise (the C library's powf is a call an element: 3 to 10 times slower).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "isa.h"

// float32 by way of float64: 2^(q log2|x|), right to half a unit in the last place and about 1e-9 more.
MVAT_INLINE float positive_power(float x, float q) {
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  constexpr int64_t kHalfRoot = 0x3fe6a09e667f3bcd;  // the bits of sqrt(1/2)
  x = std::fabs(x);
  // x = 2^e m, m in [sqrt(1/2), sqrt(2)); a zero looks like 2^-1023 and ends as zero again.
  const int64_t bits = std::bit_cast<int64_t>(double(x));
  const int64_t shifted = (bits - kHalfRoot + (int64_t(1024) << 52)) & ~((int64_t(1) << 52) - 1);  // (e + 1024) << 52
  const double m = std::bit_cast<double>(bits - shifted + (int64_t(1024) << 52));
  const double e = std::bit_cast<double>((shifted >> 52) + std::bit_cast<int64_t>(kRound)) - (kRound + 1024);
  // log2(m) = 2 / ln 2 * atanh(s)
  const double s = (m - 1) / (m + 1), s2 = s * s;
  const double log2m =
      0x1.71547652b82fep+1 * s *
      (1 + s2 * (1. / 3 + s2 * (1. / 5 + s2 * (1. / 7 + s2 * (1. / 9 + s2 * (1. / 11 + s2 * (1. / 13)))))));
  // Beyond 2^+-1000 float32 has long overflowed or vanished.
  double y = q * (e + log2m);
  y = y < -1000 ? -1000 : y > 1000 ? 1000 : y;
  const double rounded = y + kRound;
  const double f = (y - (rounded - kRound)) * 0x1.62e42fefa39efp-1;
  const double exp_f =
      1 + f * (1 + f * (1. / 2 + f * (1. / 6 + f * (1. / 24 + f * (1. / 120 + f * (1. / 720 + f * (1. / 5040 +
                                                                                    f * (1. / 40320))))))));
  const float power = float(std::bit_cast<double>(std::bit_cast<int64_t>(exp_f) + (std::bit_cast<int64_t>(rounded) << 52)));
  return x <= 3.4028234663852886e38f ? power : x;  // infinity and NaN stay what they are
}

// float64 is for checks, not for speed.
MVAT_INLINE double positive_power(double x, double q) { return std::pow(std::fabs(x), q); }
