// Elementary functions on the vector vocabulary.
#pragma once

#include "simd.inl"

namespace fused_attention {
namespace {

template <typename T>
using Vec = typename Simd<T>::Vec;
template <typename T>
constexpr int kLanes = Simd<T>::kLanes;
template <typename T>
constexpr T kInf = (T)__builtin_inf();
template <typename T>
constexpr T kLowest = sizeof(T) == 4 ? (T)-3.4028234663852886e38 : (T)-1.7976931348623157e308;
template <typename T>
constexpr T kLog2e = (T)1.4426950408889634;

template <int N, typename T>
FA_INLINE Vec<T> horner(const T (&coefficients)[N], Vec<T> x) {
  Vec<T> p = broadcast(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) p = fma(p, x, broadcast(coefficients[i]));
  return p;
}

// Coefficients of (2^f - 1) / f on [-0.5, 0.5], which leave 2^f a relative error of 2.0e-9 (float)
// and 3.4e-18 (double), and of (tanh(x) / x - 1) / x^2 as a polynomial in x^2 on [0, 0.625^2], with
// errors of 1.7e-8 and 4.2e-17: minimax and Chebyshev fits.
static const float kExp2Coefficients32[] = {0.69314720285712193f,   0.24022647913338883f,
                                            0.05550332467873448f,   0.0096184373769952213f,
                                            0.0013398875441378839f, 0.00015353359143955536f};
static const double kExp2Coefficients64[] = {
    0.69314718055994533,   0.24022650695910131,    0.055504108664820083,  0.009618129107594119,
    0.0013333558146774642, 0.00015403530457113266, 1.5252733493109485e-5, 1.3215435281794343e-6,
    1.0178199578607681e-7, 7.07378332765939e-9,    4.4347703612775107e-10};
static const float kTanhCoefficients32[] = {-0.33333328944134255f, 0.13332769736976328f,
                                            -0.053850909578513581f, 0.020997178999074751f,
                                            -0.0060967141659081976f};
static const double kTanhCoefficients64[] = {
    -0.33333333333333323,    0.13333333333326658,   -0.053968253961395571,  0.021869488260559115,
    -0.0088632298309257087,  0.0035920589774734553, -0.0014553092975346420, 0.00058743728600943819,
    -0.00023077616269519858, 7.9599557352648080e-5, -1.7244874494844330e-5};
FA_INLINE Vec<float> exp2_polynomial(Vec<float> f) { return horner(kExp2Coefficients32, f); }
FA_INLINE Vec<double> exp2_polynomial(Vec<double> f) { return horner(kExp2Coefficients64, f); }
FA_INLINE Vec<float> tanh_polynomial(Vec<float> s) { return horner(kTanhCoefficients32, s); }
FA_INLINE Vec<double> tanh_polynomial(Vec<double> s) { return horner(kTanhCoefficients64, s); }

// 2^x. Max error 1.2 ULP for x in [-126, 127] ([-1022, 1023]); 0 below, also for -inf; exactly 1 at
// 0; NaN for NaN. 2^x = 2^n * (1 + f * p(f)), n the integer next to x, f = x - n.
template <typename T>
FA_INLINE Vec<T> exp2(Vec<T> x) {
  Vec<T> n;
  const Vec<T> f = split_integer(x, &n);
  return scale_exp2(fma(exp2_polynomial(f), f, broadcast((T)1)), n);
}

// tanh(x). Max error 1.7 ULP. Below 0.625 the odd polynomial x + x^3 p(x^2), beyond it
// sign(x) (1 - 2 / (e^(2|x|) + 1)), where nothing cancels. NaN for NaN.
template <typename T>
FA_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> magnitude = abs(x), square = mul(x, x), one = broadcast((T)1);
  const Vec<T> small = fma(mul(square, x), tanh_polynomial(square), x);
  // At 22 tanh is 1 in either precision. min keeps a NaN, since it then returns its second operand.
  const Vec<T> capped = min(broadcast((T)22), magnitude);
  const Vec<T> e = exp2<T>(mul(capped, broadcast(2 * kLog2e<T>)));
  const Vec<T> positive = sub(one, div(broadcast((T)2), add(e, one)));
  const Vec<T> negative = sub(broadcast((T)0), positive);
  const Vec<T> large = select_lt(x, broadcast((T)0), negative, positive);
  return select_lt(magnitude, broadcast((T)0.625), small, large);
}

}  // namespace
}  // namespace fused_attention
