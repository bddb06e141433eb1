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
#include <vector>

namespace {

using at::vec::convert, at::vec::fmadd;
using torch::headeronly::ScalarType, torch::stable::Tensor, torch::stable::parallel_for;
using Vec = at::vec::Vectorized<float>;
using Floats = std::vector<float>;

constexpr int L = Vec::size();  // floats in a vector
constexpr int AHEAD = 4096;  // bytes to prefetch ahead: far enough for DRAM, and in the L1 cache until read
constexpr int64_t GROUP = 32;  // activations that share a scale
constexpr int64_t UNIT = 12;  // rows of weights: the least that a thread takes
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
Sums multiply(Bytes w, Bytes x) {
  __m256i a = is_unsigned ? w : _mm256_abs_epi8(w), b = is_unsigned ? x : _mm256_sign_epi8(x, w);
#ifdef __AVX512VNNI__
  return _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b));
#else
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
}

Sums add(const float* p, Sums sums) { return _mm256_add_ps(_mm256_loadu_ps(p), sums); }
Sums add(Sums x, float scale, Sums sums) { return _mm256_fmadd_ps(x, _mm256_set1_ps(scale), sums); }

void sum(const Sums* x, float* y) {
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
Sums multiply(Bytes w, Bytes x) {
  return vcvtq_f32_s32(vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.val[0], x.val[0]), w.val[1], x.val[1]));
}

Sums add(const float* p, Sums sums) { return vaddq_f32(vld1q_f32(p), sums); }
Sums add(Sums x, float scale, Sums sums) { return vfmaq_n_f32(sums, x, scale); }

void sum(const Sums* x, float* y) {
  for (int i = 0; i < 4; i++) y[i] = vaddvq_f32(x[i]);
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
Sums multiply(const Bytes& w, const Bytes& x) {
  int products = 0;
  for (int i = 0; i < GROUP; i++) products += w[i] * x[i];
  return products;
}

Sums add(const float* p, Sums sums) { return *p + sums; }
Sums add(Sums x, float scale, Sums sums) { return sums + scale * x; }

void sum(const Sums* x, float* y) { std::copy(x, x + 4, y); }
#endif

// Tokens (M, K), also rounded to 8 bits, each group of 32 with a scale of its own: x = q * scale
struct Tokens {
  int64_t K, groups, M;   // groups fill whole vectors, M what `dot` takes: the rest is zeros
  Floats x, scale, sums;  // (M, K), (M, groups), and the sums of x in each group
  std::vector<int8_t> q;  // (M, groups, 32)

  Tokens(int64_t tokens, int64_t K) : K(K) {
    groups = (K + GROUP * L - 1) / (GROUP * L) * L;
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

// A tile of quantized weights, for tokens from m0 on: y (R, M), sums of scale * (w times q) over the groups.
// The scales of int8 are those of the tokens, those of int4 are (R, M, groups). int4 sums begin at (R, M, L).
template <int R, int M, class W>
__attribute__((noinline)) void dot_groups(const W* w, const Tokens& x, int64_t m0, const float* scale,
                                          const float* start, float* y) {
  constexpr bool is_int4 = std::is_same_v<W, uint8_t>;
  constexpr size_t BYTES = is_int4 ? GROUP / 2 : GROUP;
  const int64_t K = x.K, groups = x.groups;
  const size_t stride = is_int4 ? K / 2 : K;
  const int8_t* q = &x.q[m0 * groups * GROUP];
  Sums sums[(R * M + 3) / 4 * 4] = {};
  for (int i = 0; is_int4 && i < R * M; i++) {
    for (size_t j = 0; j < L; j += sizeof(Sums) / sizeof(float)) sums[i] = add(start + i * L + j, sums[i]);
  }
  for (int64_t i = 0; i < K / GROUP; i++) {
    prefetch<R * BYTES>(w + i * R * BYTES);
    Bytes bytes[R];
    for (int r = 0; r < R; r++) bytes[r] = load(w + r * stride + i * BYTES);
    for (int m = 0; m < M; m++) {
      const Bytes token = load(q + (m * groups + i) * GROUP);
      for (int r = 0; r < R; r++) {
        const float factor = scale[(is_int4 ? r * M + m : m) * groups + i];
        sums[r * M + m] = add(multiply<is_int4>(bytes[r], token), factor, sums[r * M + m]);
      }
    }
  }
  for (int i = 0; i < R * M; i += 4) sum(sums + i, y + i);
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

  // Rows `begin` to `end` of the result y (tokens, N), in tiles of R rows and M tokens
  template <int R, int M>
  void rows(const Tokens& x, float* y, int64_t tokens, int64_t begin, int64_t end) const {
    Floats factors(UNIT * M * x.groups), starts(UNIT * M * L);
    for (int64_t m0 = 0; m0 < x.M; m0 += BLOCK) {
      for (int64_t first = begin; first < end; first += UNIT) {
        const int64_t last = std::min(first + UNIT, end);
        for (int64_t m = m0; m < std::min(m0 + BLOCK, x.M); m += M) {
          if (dtype == ScalarType::Byte) fold<M>(first, last - first, m, x, factors.data(), starts.data());
          for (int64_t n = first; n < last;) {
            const float *factor = &factors[(n - first) * M * x.groups], *start = &starts[(n - first) * M * L];
            if (n + R <= last) tile<R, M>(n, m, x, factor, start, y, tokens), n += R;
            else tile<1, M>(n, m, x, factor, start, y, tokens), n++;
          }
        }
      }
    }
  }

  template <int R, int M>
  void tile(int64_t n, int64_t m, const Tokens& x, const float* factors, const float* starts, float* y,
            int64_t tokens) const {
    float out[R * M + 3];  // `sum` writes four at a time
    if (dtype == ScalarType::Char) {
      dot_groups<R, M>(static_cast<const int8_t*>(w) + n * K, x, m, &x.scale[m * x.groups], nullptr, out);
      with_type(scale_dtype, [&](auto T) {
        for (int i = 0; i < R * M; i++) out[i] *= float(static_cast<const decltype(T)*>(scale)[n + i / M]);
      });
    } else if (dtype == ScalarType::Byte) {
      dot_groups<R, M>(static_cast<const uint8_t*>(w) + n * K / 2, x, m, factors, starts, out);
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

  // An int4 weight is (q - 8) * scale + zero, so a group is scale * (q times x) + (zero - 8 * scale) * sum(x):
  // the factors of (q times x), (rows, M, groups), and the rest of all groups as partial sums (rows, M, L)
  template <int M>
  void fold(int64_t n, int64_t rows, int64_t m, const Tokens& x, float* factors, float* starts) const {
    with_type(scale_dtype, [=, &x, this](auto type) {
      using T = decltype(type);
      const int64_t groups = x.groups, stored = K / group, all = K / GROUP, repeat = all / stored;
      const float *x_scale = &x.scale[m * groups], *x_sum = &x.sums[m * groups];
      const T* from = static_cast<const T*>(scale) + n * 2 * stored;
      std::vector<T> copy;
      if (repeat > 1 || (N - n - rows) * 2 * all < L) {  // vectors read past the end of the rows
        copy.resize(rows * 2 * all + L);
        for (int64_t i = 0; i < rows * 2 * all; i++) copy[i] = from[i / repeat];
        from = copy.data();
      }
      float* to = factors;
      for (int64_t r = 0; r < rows; r++, to += M * groups, from += 2 * all) {
        Vec sums[M];
        std::fill_n(sums, M, Vec(0));
        for (int64_t i = 0; i < groups; i += L) {
          const Vec scale = widen(from + i), rest = fmadd(Vec(-8), scale, widen(from + all + i));
          for (int j = 0; j < M; j++) {
            (scale * Vec::loadu(x_scale + j * groups + i)).store(to + j * groups + i);
            sums[j] = fmadd(rest, Vec::loadu(x_sum + j * groups + i), sums[j]);
          }
        }
        for (int j = 0; j < M; j++) sums[j].store(starts + (r * M + j) * L);
      }
    });
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
      if (x.M == 1) weight->rows<4, 1>(x, y, tokens, first, last);
      else if (x.M == 2) weight->rows<4, 2>(x, y, tokens, first, last);
      else if (weight->scale) weight->rows<2, 4>(x, y, tokens, first, last);
      else weight->rows<3, 4>(x, y, tokens, first, last);
      begin -= weight->units(), end -= weight->units();  // to the next weight
    }
  });
}

}  // namespace
