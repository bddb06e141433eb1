// Products for decode.cpp: a few tokens x (M, K) times the weights (N, K) of Linears, plain or quantized.
//
// For one token, the time is that of reading the weights, so they are prefetched. For more, it is that of the
// arithmetic: each weight is loaded once for several tokens, and each token once for several rows of weights.
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
#include <cstring>
#include <vector>

namespace {

using at::vec::convert, at::vec::fmadd;
using torch::headeronly::ScalarType, torch::stable::Tensor, torch::stable::parallel_for;
using Vec = at::vec::Vectorized<float>;
using Floats = std::vector<float>;

constexpr int L = Vec::size();  // floats in a vector
constexpr int AHEAD = 4096;  // bytes to prefetch ahead: far enough for DRAM, and in the L1 cache until read
constexpr int64_t GROUP = 32;  // activations that share a scale
constexpr int64_t UNIT = 24;  // rows of weights: the least that a thread takes
constexpr int64_t BLOCK = 32;  // tokens. Both stay in the cache until they are multiplied

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

// L numbers as floats
template <class T>
Vec widen(const T* p) {
  Vec x;
  if constexpr (sizeof(T) == 4) x = Vec::loadu(p);
  else at::vec::load_to_float(p, x);
  return x;
}

// n numbers as floats
template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + L <= n; i += L) widen(from + i).store(to + i);
  for (; i < n; i++) to[i] = from[i];
}

template <class F>
float reduce(Vec x, const F& f) {
  return at::vec::vec_reduce_all<float>(f, x);
}

float sum(Vec x) {
  return reduce(x, [](Vec& a, Vec& b) { return a + b; });
}

// A tile of R rows of weights times M tokens: y (R, M) of w (R, K) and x (M, K)
template <int R, int M, class T>
__attribute__((noinline)) void dot(const T* w, const float* x, int64_t K, float* y) {
  constexpr int CHAINS = R * M < 8 ? 2 : 1;  // 8 sums side by side hide the latency of fmadd
  Vec sums[R][M][CHAINS];
  for (auto& row : sums)
    for (auto& token : row) std::fill_n(token, CHAINS, Vec(0));
  int64_t k = 0;
  for (; k + 2 * L <= K; k += 2 * L) {
    for (int r = 0; r < R; r++) prefetch<2 * L * sizeof(T)>(w + R * k + r * 2 * L);
    for (int half = 0; half < 2; half++) {
      Vec weights[R];
      for (int r = 0; r < R; r++) weights[r] = widen(w + r * K + k + half * L);
      for (int m = 0; m < M; m++) {
        const Vec token = Vec::loadu(x + m * K + k + half * L);
        for (int r = 0; r < R; r++) {
          Vec& of = sums[r][m][half % CHAINS];
          of = fmadd(weights[r], token, of);
        }
      }
    }
  }
  for (int i = 0; i < R * M; i++) {
    const int r = i / M, m = i % M;
    y[i] = sum(CHAINS == 1 ? sums[r][m][0] : sums[r][m][0] + sums[r][m][CHAINS - 1]);
    for (int64_t j = k; j < K; j++) y[i] += float(w[r * K + j]) * x[m * K + j];
  }
}

// Quantized weights are multiplied as integers, a group of 32 at a time.
// int8: `Bytes` are a group of one row, `Sums` are partial sums of its products.
// int4: rows come in eights. A group of 8 x 32 is 128 bytes, (4, 8, 4). Byte (i, r, j) has column 4i + j of
// row r in its low half, and column 16 + 4i + j in its high half. `Columns` are such a group, unpacked.
// `Ints` and `Eight` have a number for each row.
using Ints = int32_t __attribute__((vector_size(32)));
using Eight = float __attribute__((vector_size(32)));

int32_t four_bytes(const int8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return bytes;
}

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
using Bytes = __m256i;
using Sums = __m256;
using Columns = std::array<Bytes, 8>;

Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// |w| times x with w's sign: the instructions take one unsigned factor
Sums multiply(Bytes w, Bytes x) {
  __m256i a = _mm256_abs_epi8(w), b = _mm256_sign_epi8(x, w);
#ifdef __AVX512VNNI__
  return _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b));
#else
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
}

Columns unpack(const uint8_t* p) {
  const Bytes low = _mm256_set1_epi8(15);
  Columns columns;
  for (int i = 0; i < 4; i++) {
    const Bytes pairs = load(p + 32 * i);
    columns[i] = _mm256_and_si256(pairs, low);
    columns[4 + i] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
  }
  return columns;
}

Ints multiply(const Columns& w, const int8_t* x) {
  Bytes sums = _mm256_setzero_si256();
  for (int i = 0; i < 8; i++) {
    const Bytes token = _mm256_set1_epi32(four_bytes(x + 4 * i));
#ifdef __AVX512VNNI__
    sums = _mm256_dpbusd_epi32(sums, w[i], token);
#else
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(w[i], token));  // 16 bits hold 16 * 15 * 127
#endif
  }
#ifndef __AVX512VNNI__
  sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
  return (Ints)sums;
}

Sums add(Sums x, float scale, Sums sums) { return _mm256_fmadd_ps(x, _mm256_set1_ps(scale), sums); }

void sum(const Sums* x, float* y) {
  __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
using Bytes = int8x16x2_t;
using Sums = float32x4_t;
using Columns = std::array<Bytes, 8>;

Bytes load(const int8_t* p) { return vld1q_s8_x2(p); }

Sums multiply(Bytes w, Bytes x) {
  return vcvtq_f32_s32(vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.val[0], x.val[0]), w.val[1], x.val[1]));
}

Columns unpack(const uint8_t* p) {
  Columns columns;
  for (int i = 0; i < 8; i++) {
    const uint8x16_t pairs = vld1q_u8(p + 16 * i);
    columns[i / 2].val[i % 2] = vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15)));
    columns[4 + i / 2].val[i % 2] = vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4));
  }
  return columns;
}

Ints multiply(const Columns& w, const int8_t* x) {
  int32x4_t sums[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
  for (int i = 0; i < 8; i++) {
    const int8x16_t token = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x + 4 * i)));
    for (int half = 0; half < 2; half++) sums[half] = vdotq_s32(sums[half], w[i].val[half], token);
  }
  Ints result;
  std::memcpy(&result, sums, sizeof(sums));
  return result;
}

Sums add(Sums x, float scale, Sums sums) { return vfmaq_n_f32(sums, x, scale); }

void sum(const Sums* x, float* y) {
  for (int i = 0; i < 4; i++) y[i] = vaddvq_f32(x[i]);
}
#else
using Bytes = const int8_t*;
using Sums = float;
using Columns = const uint8_t*;

Bytes load(const int8_t* p) { return p; }

Sums multiply(Bytes w, Bytes x) {
  int products = 0;
  for (int i = 0; i < GROUP; i++) products += w[i] * x[i];
  return products;
}

Columns unpack(const uint8_t* p) { return p; }

Ints multiply(Columns w, const int8_t* x) {
  Ints sums = {};
  for (int i = 0; i < 128; i++) {
    const int row = i / 4 % 8, k = i / 32 * 4 + i % 4;
    sums[row] += (w[i] & 15) * x[k] + (w[i] >> 4) * x[16 + k];
  }
  return sums;
}

Sums add(Sums x, float scale, Sums sums) { return sums + scale * x; }

void sum(const Sums* x, float* y) { std::copy(x, x + 4, y); }
#endif

// Tokens (M, K), also rounded to 8 bits, each group of 32 with a scale of its own: x = q * scale
struct Tokens {
  int64_t K, groups, M;   // M is what `dot` takes: the rest is zeros
  Floats x, scale, sums;  // (M, K), (M, groups), and the sums of x in each group
  std::vector<int8_t> q;  // (M, groups, 32)

  Tokens(int64_t tokens, int64_t K) : K(K) {
    groups = (K + GROUP - 1) / GROUP;
    M = tokens > 2 ? (tokens + 3) / 4 * 4 : tokens;
    x.resize(M * K), scale.resize(M * groups), sums.resize(M * groups), q.resize(M * groups * GROUP);
  }

  void round() {
    for (int64_t m = 0; m < M; m++) {
      for (int64_t k = 0; k < K; k += GROUP) {
        const int64_t i = m * groups + k / GROUP, n = std::min(K - k, GROUP);
        float group[GROUP] = {};
        if (n < GROUP) std::copy_n(&x[m * K + k], n, group);
        round(n == GROUP ? &x[m * K + k] : group, &q[i * GROUP], scale[i], sums[i]);
      }
    }
  }

  static void round(const float* group, int8_t* q, float& scale, float& total) {
    Vec most(0);  // NaN if one of them is
    for (int j = 0; j < GROUP; j += L) most = at::vec::maximum(most, Vec::loadu(group + j).abs());
    const float largest = reduce(most, [](Vec& a, Vec& b) { return at::vec::maximum(a, b); });
    const bool is_finite = std::isfinite(largest);
    const Vec inverse(std::isfinite(127 / largest) ? 127 / largest : 0);  // 0 for what is almost 0
    int32_t rounded[GROUP] = {}, sum = 0;
    for (int j = 0; is_finite && j < GROUP; j += L) {
      convert<int32_t>((Vec::loadu(group + j) * inverse).round()).store(rounded + j);
    }
    for (int j = 0; j < GROUP; j++) sum += rounded[j];
    std::copy_n(rounded, GROUP, q);
    scale = is_finite ? largest / 127 : NAN;
    total = scale * sum;
  }
};

// A tile of int8 weights, for tokens from m0 on: y (R, M), sums of (w times q) * the token's scale
template <int R, int M>
__attribute__((noinline)) void dot_int8(const int8_t* w, const Tokens& x, int64_t m0, float* y) {
  const int64_t K = x.K, groups = x.groups;
  const int8_t* q = &x.q[m0 * groups * GROUP];
  const float* scale = &x.scale[m0 * groups];
  Sums sums[(R * M + 3) / 4 * 4] = {};
  for (int64_t i = 0; i < K / GROUP; i++) {
    prefetch<R * GROUP>(w + i * R * GROUP);
    Bytes bytes[R];
    for (int r = 0; r < R; r++) bytes[r] = load(w + r * K + i * GROUP);
    for (int m = 0; m < M; m++) {
      const Bytes token = load(q + (m * groups + i) * GROUP);
      for (int r = 0; r < R; r++) {
        sums[r * M + m] = add(multiply(bytes[r], token), scale[m * groups + i], sums[r * M + m]);
      }
    }
  }
  for (int i = 0; i < R * M; i += 4) sum(sums + i, y + i);
  for (int j = 0; K % GROUP && j < R * M; j++) {  // rows may end in half a group
    int rest = 0;
    for (int64_t k = K / GROUP * GROUP; k < K; k++) rest += w[j / M * K + k] * q[j % M * groups * GROUP + k];
    y[j] += rest * scale[j % M * groups + K / GROUP];
  }
}

// 8 rows of int4 weights, for tokens from m0 on: y (M, 8). scales: scale and zero, (K / size, 2, 8).
// A weight is (q - 8) * scale + zero, so a group is scale * (q times x) + (zero - 8 * scale) * sum(x).
template <int M, class T>
__attribute__((noinline)) void dot_int4(const uint8_t* w, const T* scales, int64_t size, const Tokens& x,
                                        int64_t m0, float* y) {
  Eight sums[M] = {};
  for (int64_t i = 0; i < x.K / GROUP; scales += 16) {
    Eight scale, rest;
    for (int r = 0; r < 8; r++) scale[r] = float(scales[r]), rest[r] = float(scales[8 + r]);
    rest -= 8.f * scale;
    for (const int64_t end = i + size / GROUP; i < end; i++, w += 4 * GROUP) {
      prefetch<4 * GROUP>(w);
      const Columns columns = unpack(w);
      for (int m = 0; m < M; m++) {
        const int64_t at = (m0 + m) * x.groups + i;
        const Eight products = __builtin_convertvector(multiply(columns, &x.q[at * GROUP]), Eight);
        sums[m] += products * (scale * x.scale[at]) + rest * x.sums[at];
      }
    }
  }
  std::memcpy(y, sums, sizeof(sums));
}

// Weights (N, K) of a Linear, and its bias
struct Linear {
  int64_t N = 0, K = 0, group = 0;
  ScalarType dtype, scale_dtype;
  const void *w = nullptr, *scale = nullptr;  // scale: (N,) of int8; int4: and zero, (N / 8, K / group, 2, 8)
  Floats bias;

  int64_t units() const { return (N + UNIT - 1) / UNIT; }

  // Rows `begin` to `end` of the result y (tokens, N), for M tokens at a time
  template <int M>
  void rows(const Tokens& x, float* y, int64_t tokens, int64_t begin, int64_t end) const {
    if (dtype == ScalarType::Byte) tiles<8, M>(x, y, tokens, begin, end);
    else if (dtype == ScalarType::Char) tiles<M < 4 ? 4 : 2, M>(x, y, tokens, begin, end);
    else tiles<M < 4 ? 4 : 3, M>(x, y, tokens, begin, end);
  }

  template <int R, int M>
  void tiles(const Tokens& x, float* y, int64_t tokens, int64_t begin, int64_t end) const {
    for (int64_t m0 = 0; m0 < x.M; m0 += BLOCK) {
      for (int64_t first = begin; first < end; first += UNIT) {
        const int64_t last = std::min(first + UNIT, end);
        for (int64_t m = m0; m < std::min(m0 + BLOCK, x.M); m += M) {
          int64_t n = first;
          for (; n + R <= last; n += R) tile<R, M>(n, m, x, y, tokens);
          for (; n < last; n++) tile<1, M>(n, m, x, y, tokens);  // never of int4
        }
      }
    }
  }

  template <int R, int M>
  void tile(int64_t n, int64_t m, const Tokens& x, float* y, int64_t tokens) const {
    float out[R * M + 3];  // `sum` writes four at a time
    if constexpr (R == 8) {
      with_type(scale_dtype, [&](auto T) {
        const auto* scales = static_cast<const decltype(T)*>(scale) + n * 2 * K / group;
        dot_int4<M>(static_cast<const uint8_t*>(w) + n * K / 2, scales, group, x, m, out);
      });
    } else if (dtype == ScalarType::Char) {
      dot_int8<R, M>(static_cast<const int8_t*>(w) + n * K, x, m, out);
      with_type(scale_dtype, [&](auto T) {
        for (int i = 0; i < R * M; i++) out[i] *= float(static_cast<const decltype(T)*>(scale)[n + i / M]);
      });
    } else {
      with_type(dtype, [&](auto T) {
        dot<R, M>(static_cast<const decltype(T)*>(w) + n * K, &x.x[m * K], K, out);
      });
    }
    for (int i = 0; i < M && m + i < tokens; i++) {
      float* to = &y[(m + i) * N + n];
      for (int r = 0; r < R; r++) to[r] = R == 8 ? out[i * R + r] : out[r * M + i];
      for (int r = 0; r < R && !bias.empty(); r++) to[r] += bias[n + r];
    }
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
