// Products for decode.cpp: a few tokens x (M, K) times the weights (N, K) of Linears, plain or quantized.
//
// Their time is that of reading the weights, so each weight is read once for all tokens, and prefetched.
// Quantized weights are multiplied by activations that are rounded to 8 bits, as in llama.cpp: each group of
// 32 has a scale. at::vec are PyTorch's own vectors, for each CPU.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using at::vec::Vectorized, at::vec::convert, at::vec::fmadd;
using torch::headeronly::ScalarType, torch::stable::Tensor, torch::stable::parallel_for;
using Vec = Vectorized<float>;
using Floats = std::vector<float>;

constexpr int L = Vec::size();  // floats in a vector
constexpr int AHEAD = 4096;  // bytes to prefetch ahead: far enough for DRAM, and in the L1 cache until read
constexpr int TILE = 4;  // products that are computed side by side
constexpr int64_t GROUP = 32;  // activations that share a scale
constexpr int64_t UNIT = 16;  // rows of weights: the least that a thread takes

// f(T()) for the C++ type T of a dtype
template <class F>
void with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::BFloat16: return f(c10::BFloat16());
    case ScalarType::Half: return f(c10::Half());
    default: STD_TORCH_CHECK(false, "decode takes float32, bfloat16 and float16");
  }
}

// Ask for the memory AHEAD of p. It need not exist
template <int bytes>
void prefetch(const void* p) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + AHEAD + i);
}

// 2 * L numbers as floats
template <class T>
std::array<Vec, 2> widen(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return {Vec::loadu(p), Vec::loadu(p + L)};
  } else {
    auto pair = convert<float, 2, T, 1>(Vectorized<T>::loadu(p));
    return {pair[0], pair[1]};
  }
}

// n numbers as floats
template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    auto [first, second] = widen(from + i);
    first.store(to + i), second.store(to + i + L);
  }
  for (; i < n; i++) to[i] = from[i];
}

template <class F>
float reduce(Vec x, const F& f) {
  return at::vec::vec_reduce_all<float>(f, x);
}

float sum(Vec x) {
  return reduce(x, [](Vec& a, Vec& b) { return a + b; });
}

// A tile of R rows of weights times M tokens: y (R, M) of w (R, K) and x (M, K). Each weight is read once
template <int R, int M, class T>
__attribute__((noinline)) void dot(const T* w, const float* x, int64_t K, float* y) {
  Vec even[R * M], odd[R * M];
  for (int i = 0; i < R * M; i++) even[i] = odd[i] = Vec(0);
  int64_t k = 0;
  for (; k + 2 * L <= K; k += 2 * L) {
    for (int r = 0; r < R; r++) {
      prefetch<2 * L * sizeof(T)>(w + R * k + r * 2 * L);
      auto [first, second] = widen(w + r * K + k);
      for (int m = 0; m < M; m++) {
        even[r * M + m] = fmadd(first, Vec::loadu(x + m * K + k), even[r * M + m]);
        odd[r * M + m] = fmadd(second, Vec::loadu(x + m * K + k + L), odd[r * M + m]);
      }
    }
  }
  for (int i = 0; i < R * M; i++) {
    y[i] = sum(even[i] + odd[i]);
    for (int64_t j = k; j < K; j++) y[i] += float(w[i / M * K + j]) * x[i % M * K + j];
  }
}

// Quantized weights are multiplied as integers, 32 at a time. `Bytes` are 32 numbers of 8 bits, `Sums` are
// partial sums of their products. int4 packs 32 weights into 16 bytes: first the low halves of the bytes,
// then the high ones.
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
using Bytes = __m256i;
using Sums = __m256;

Bytes load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

Bytes load(const uint8_t* p) {
  __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(pairs, 4), pairs), _mm256_set1_epi8(15));
}

// |w| times x with w's sign: the instructions take one unsigned factor
template <bool is_unsigned>
Sums add_products(Bytes w, Bytes x, float scale, Sums sums) {
  __m256i a = is_unsigned ? w : _mm256_abs_epi8(w), b = is_unsigned ? x : _mm256_sign_epi8(x, w);
#ifdef __AVX512VNNI__
  __m256i products = _mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b);
#else
  __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
#endif
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(scale), sums);
}

Sums add_products(const float* a, const float* b, Sums sums) {
  return _mm256_fmadd_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), sums);
}

void sum(const Sums (&x)[TILE], float* y) {
  __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
using Bytes = int8x16x2_t;
using Sums = float32x4_t;

Bytes load(const int8_t* p) { return vld1q_s8_x2(p); }

Bytes load(const uint8_t* p) {
  uint8x16_t pairs = vld1q_u8(p);
  return {vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4))};
}

template <bool is_unsigned>
Sums add_products(Bytes w, Bytes x, float scale, Sums sums) {
  int32x4_t products = vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.val[0], x.val[0]), w.val[1], x.val[1]);
  return vfmaq_n_f32(sums, vcvtq_f32_s32(products), scale);
}

Sums add_products(const float* a, const float* b, Sums sums) {
  return vfmaq_f32(sums, vld1q_f32(a), vld1q_f32(b));
}

void sum(const Sums (&x)[TILE], float* y) {
  for (int i = 0; i < TILE; i++) y[i] = vaddvq_f32(x[i]);
}
#else
using Bytes = std::array<int8_t, GROUP>;
using Sums = float;

Bytes load(const int8_t* p) {
  Bytes bytes;
  std::copy(p, p + GROUP, bytes.begin());
  return bytes;
}

Bytes load(const uint8_t* p) {
  Bytes bytes;
  for (int i = 0; i < GROUP / 2; i++) bytes[i] = p[i] & 15, bytes[GROUP / 2 + i] = p[i] >> 4;
  return bytes;
}

template <bool is_unsigned>
Sums add_products(const Bytes& w, const Bytes& x, float scale, Sums sums) {
  int products = 0;
  for (int i = 0; i < GROUP; i++) products += w[i] * x[i];
  return sums + scale * products;
}

Sums add_products(const float* a, const float* b, Sums sums) { return sums + *a * *b; }

void sum(const Sums (&x)[TILE], float* y) { std::copy(x, x + TILE, y); }
#endif

// Tokens (M, K), also rounded to 8 bits, each group of 32 with a scale of its own: x = q * scale
struct Tokens {
  int64_t K, groups, M;   // groups fill whole vectors, M what `dot` takes: the rest is zeros
  Floats x, scale, sums;  // (M, K), (M, groups), and the sums of x in each group
  std::vector<int8_t> q;  // (M, groups, 32)

  Tokens(int64_t tokens, int64_t K) : K(K) {
    groups = (K + GROUP * L - 1) / (GROUP * L) * L;
    M = tokens > 2 ? (tokens + TILE - 1) / TILE * TILE : tokens;
    x.resize(M * K), scale.resize(M * groups), sums.resize(M * groups), q.resize(M * groups * GROUP);
  }

  void round() {
    for (int64_t i = 0; i < M * groups; i++) {
      const int64_t k = i % groups * GROUP, n = std::clamp<int64_t>(K - k, 0, GROUP);
      float group[GROUP] = {};
      std::copy_n(x.begin() + i / groups * K + std::min(k, K), n, group);
      Vec most(0);  // NaN if one of them is
      for (int j = 0; j < GROUP; j += L) most = at::vec::maximum(most, Vec::loadu(group + j).abs());
      const float largest = reduce(most, [](Vec& a, Vec& b) { return at::vec::maximum(a, b); });
      const bool is_finite = std::isfinite(largest);
      const Vec inverse(std::isfinite(127 / largest) ? 127 / largest : 0);  // 0 for what is almost 0
      int32_t rounded[GROUP] = {}, sum = 0;
      for (int j = 0; is_finite && j < GROUP; j += L) {
        convert<int32_t>((Vec::loadu(group + j) * inverse).round()).store(rounded + j);
      }
      for (int j = 0; j < GROUP; j++) q[i * GROUP + j] = rounded[j], sum += rounded[j];
      scale[i] = is_finite ? largest / 127 : NAN;
      sums[i] = scale[i] * sum;
    }
  }
};

// A tile of quantized weights, for tokens from m0 on: y (R, M), sums of scale * (w times q) over the groups.
// The scales of int8 are those of the tokens, (M, groups). Those of int4 are (R, M, groups), and zeros
// (R, groups) times the tokens' sums come on top.
template <int R, int M, class W>
__attribute__((noinline)) void dot_groups(const W* w, const Tokens& x, int64_t m0, const float* scale,
                                          const float* zeros, float* y) {
  constexpr bool is_int4 = std::is_same_v<W, uint8_t>;
  constexpr size_t BYTES = is_int4 ? GROUP / 2 : GROUP;
  const int64_t K = x.K, groups = x.groups;
  const size_t stride = is_int4 ? K / 2 : K;
  const int8_t* q = &x.q[m0 * groups * GROUP];
  Sums sums[TILE] = {};
  for (int64_t i = 0; i < K / GROUP; i++) {
    prefetch<R * BYTES>(w + i * R * BYTES);
    for (int r = 0; r < R; r++) {
      Bytes bytes = load(w + r * stride + i * BYTES);
      for (int m = 0; m < M; m++) {
        const float factor = scale[(is_int4 ? r * M + m : m) * groups + i];
        Sums& of = sums[r * M + m];
        of = add_products<is_int4>(bytes, load(q + (m * groups + i) * GROUP), factor, of);
      }
    }
  }
  for (int64_t i = 0; is_int4 && i < groups; i += sizeof(Sums) / sizeof(float)) {
    for (int j = 0; j < R * M; j++) {
      sums[j] = add_products(zeros + j / M * groups + i, &x.sums[(m0 + j % M) * groups + i], sums[j]);
    }
  }
  sum(sums, y);
  for (int j = 0; !is_int4 && K % GROUP && j < R * M; j++) {  // rows of int8 may end in half a group
    int rest = 0;
    for (int64_t k = K / GROUP * GROUP; k < K; k++) rest += w[j / M * K + k] * q[j % M * groups * GROUP + k];
    y[j] += rest * scale[j % M * groups + K / GROUP];
  }
}

// Weights (N, K) of a Linear, and its bias
struct Linear {
  int64_t N = 0, K = 0, group = 0;
  ScalarType dtype, scale_dtype;
  const void *w = nullptr, *scale = nullptr;  // scale: (N,) of int8; scale and zero (N, 2, K / group) of int4
  Floats bias;

  int64_t units() const { return (N + UNIT - 1) / UNIT; }

  // Rows `begin` to `end` of the result y (tokens, N), some at a time: they stay in the cache for all tokens
  template <int M>
  void rows(const Tokens& x, float* y, int64_t tokens, int64_t begin, int64_t end) const {
    Floats scratch((4 * TILE + 1) * x.groups);  // of dot_int4
    for (; begin < end; begin += UNIT) {
      for (int64_t m = 0; m < x.M; m += M) {
        const int64_t last = std::min(begin + UNIT, end);
        int64_t n = begin;
        for (; n + TILE / M <= last; n += TILE / M) tile<TILE / M, M>(n, m, x, scratch.data(), y, tokens);
        for (; n < last; n++) tile<1, M>(n, m, x, scratch.data(), y, tokens);
      }
    }
  }

  template <int R, int M>
  void tile(int64_t n, int64_t m, const Tokens& x, float* scratch, float* y, int64_t tokens) const {
    float out[TILE];
    if (dtype == ScalarType::Char) {
      dot_groups<R, M>(static_cast<const int8_t*>(w) + n * K, x, m, &x.scale[m * x.groups], nullptr, out);
      with_type(scale_dtype, [&](auto T) {
        for (int i = 0; i < R * M; i++) out[i] *= float(static_cast<const decltype(T)*>(scale)[n + i / M]);
      });
    } else if (dtype == ScalarType::Byte) {
      dot_int4<R, M>(n, x, m, scratch, out);
    } else {
      with_type(dtype, [&](auto T) {
        dot<R, M>(static_cast<const decltype(T)*>(w) + n * K, &x.x[m * K], K, out);
      });
    }
    for (int i = 0; i < R * M; i++) {
      const int64_t token = m + i % M, row = n + i / M;
      if (token < tokens) y[token * N + row] = out[i] + (bias.empty() ? 0 : bias[row]);
    }
  }

  // A weight is (q - 8) * scale + zero, so each group is scale * (q times x) + (zero - 8 * scale) * sum(x)
  template <int R, int M>
  void dot_int4(int64_t n, const Tokens& x, int64_t m0, float* scratch, float* out) const {
    const int64_t groups = x.groups, stored = K / group, repeat = group / GROUP;
    float *pairs = scratch, *factors = pairs + (2 * R + 1) * groups, *zeros = factors + R * M * groups;
    with_type(scale_dtype, [&](auto T) {
      widen(static_cast<const decltype(T)*>(scale) + n * 2 * stored, R * 2 * stored, pairs);
    });
    for (int64_t i = R * 2 * stored * repeat; repeat > 1 && i-- > 0;) pairs[i] = pairs[i / repeat];
    for (int r = 0; r < R; r++) {
      const float *scales = pairs + 2 * r * stored * repeat, *start = scales + stored * repeat;
      for (int64_t j = 0; j < groups; j += L) {
        Vec scale = Vec::loadu(scales + j);
        fmadd(Vec(-8), scale, Vec::loadu(start + j)).store(zeros + r * groups + j);
        for (int m = 0; m < M; m++) {
          (scale * Vec::loadu(&x.scale[(m0 + m) * groups + j])).store(factors + (r * M + m) * groups + j);
        }
      }
    }
    dot_groups<R, M>(static_cast<const uint8_t*>(w) + n * K / 2, x, m0, factors, zeros, out);
  }
};

// Each Linear's result y (tokens, N) for the same x. The threads start once, and share all rows equally
void linear(Tokens& x, int64_t tokens, const std::vector<std::pair<const Linear*, float*>>& products) {
  int64_t units = 0;
  bool rounds = false;
  for (auto [weight, y] : products) {
    units += weight->units();
    rounds |= weight->scale != nullptr;
  }
  if (rounds) x.round();
  parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (auto [weight, y] : products) {
      const int64_t first = std::max<int64_t>(begin, 0) * UNIT, last = std::min(end * UNIT, weight->N);
      if (x.M == 1) weight->rows<1>(x, y, tokens, first, last);
      else if (x.M == 2) weight->rows<2>(x, y, tokens, first, last);
      else weight->rows<4>(x, y, tokens, first, last);
      begin -= weight->units(), end -= weight->units();  // to the next weight
    }
  });
}

}  // namespace
