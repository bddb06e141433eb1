// One row times weights, plain or quantized: the product of decoding, whose time is that of reading the weights.
//
// A loop of torch.compile reads them at half of the memory's speed. These prefetch, and read at about all of it.
// at::vec are PyTorch's own vectors, for each CPU. weights.py compiles this file as torch.compile compiles its own code,
// and defines BLOCK and INTERLEAVED, which describe PyTorch's layout of int4 weights.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

using at::vec::Vectorized, at::vec::convert, at::vec::fmadd;
using torch::headeronly::ScalarType, torch::stable::Tensor;
using Vec = Vectorized<float>;
using Ints = Vectorized<int32_t>;

constexpr int L = Vec::size();  // floats in a vector
constexpr int AHEAD = 4096;     // bytes: far enough for DRAM, and still in the L1 cache when it is read

// Ask for `bytes` of memory, `ahead` bytes further on. They need not exist.
template <int bytes, int ahead = AHEAD>
void prefetch(const void* p) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + ahead + i);
}

// L weights of one byte each
template <class T>
Ints load_bytes(const T* w) {
#ifdef CPU_CAPABILITY_AVX2  // where loadu copies, if it takes less than a vector
  return convert<int32_t>(Vectorized<T>::loadu_one_fourth(w));
#else
  return convert<int32_t>(Vectorized<T>::loadu(w, L));
#endif
}

// 2 * L weights as floats
template <class T>
std::array<Vec, 2> widen(const T* w) {
  if constexpr (sizeof(T) == 1) {
    return {convert<float>(load_bytes(w)), convert<float>(load_bytes(w + L))};
  } else if constexpr (sizeof(T) == 2) {
    auto pair = convert<float, 2, T, 1>(Vectorized<T>::loadu(w));
    return {pair[0], pair[1]};
  } else {
    return {Vec::loadu(w), Vec::loadu(w + L)};
  }
}

float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

// w (K,) times x (K,)
template <class T>
float dot(const T* w, const float* x, int64_t K) {
  Vec even(0), odd(0);
  int64_t k = 0;
  for (; k + 2 * L <= K; k += 2 * L) {
    prefetch<2 * L * sizeof(T)>(w + k);
    auto [first, second] = widen(w + k);
    even = fmadd(first, Vec::loadu(x + k), even);
    odd = fmadd(second, Vec::loadu(x + k + L), odd);
  }
  float y = sum(even + odd);
  for (; k < K; k++) y += float(w[k]) * x[k];
  return y;
}

// A block of int4 rows (K, BLOCK / 2), each byte one channel of two rows, times x: y (BLOCK,). scale_zero points to the
// block's first row in (K / group, N, 2); sums (K / group,) are those of x in each group.
template <class T>
void dot_int4(float* y, const uint8_t* w, const T* scale_zero, int64_t N, const float* x, const float* sums, int64_t K,
              int64_t group) {
  constexpr int BYTES = BLOCK / 2, V = BYTES / L;
  Vec total[2 * V];
  for (Vec& t : total) t = Vec(0);
  for (int64_t i = 0; i < K / group; i++, scale_zero += 2 * N) {
    prefetch<2 * BLOCK * sizeof(T), 0>(scale_zero + 4 * N);  // of the group after the next
    Vec low[V], high[V];                                 // sums of q * x, for the low and high half of each byte
    for (int v = 0; v < V; v++) low[v] = high[v] = Vec(0);
    for (int64_t k = 0; k < group; k += 2, w += 2 * BYTES) {
      prefetch<2 * BYTES>(w);
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        Vec xk(x[i * group + k + j]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          Ints q = load_bytes(w + j * BYTES + v * L);
          low[v] = fmadd(convert<float>(q & Ints(15)), xk, low[v]);
          high[v] = fmadd(convert<float>(q >> Ints(4)), xk, high[v]);
        }
      }
    }
    Vec sum_x(sums[i]), eight = Vec(8) * sum_x;
    for (int v = 0; v < V; v++) {
      Vec a = low[v], b = high[v];
      int rows[] = {v * L, BYTES + v * L};
      if (INTERLEAVED) {
        std::tie(a, b) = at::vec::interleave2(a, b);
        rows[0] = 2 * v * L, rows[1] = 2 * v * L + L;
      }
      Vec products[] = {a, b};
      for (int h = 0; h < 2; h++) {
        auto pairs = widen(scale_zero + 2 * rows[h]);
        auto [scale, zero] = at::vec::deinterleave2(pairs[0], pairs[1]);
        Vec& t = total[rows[h] / L];
        t = fmadd(scale, products[h] - eight, fmadd(zero, sum_x, t));
      }
    }
  }
  for (int v = 0; v < 2 * V; v++) total[v].store(y + v * L);
}

template <class T>
void multiply(Tensor& y, const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& scales) {
  const bool int8 = !scales.empty() && scales[0].dim() == 1, int4 = !scales.empty() && !int8;
  const int64_t K = x.numel(), group = int4 ? K / scales[0].size(0) : K;
  const int64_t step = int4 ? BLOCK : 1, unit = int4 ? BLOCK : 16;  // rows: of one dot, and least of a thread

  std::vector<float> xs(K), sums(int4 ? K / group : 0);
  const T* in = static_cast<const T*>(x.const_data_ptr());
  int64_t k = 0;
  for (; k + 2 * L <= K; k += 2 * L) {
    auto [first, second] = widen(in + k);
    first.store(&xs[k]), second.store(&xs[k + L]);
  }
  for (; k < K; k++) xs[k] = float(in[k]);
  for (size_t i = 0; i < sums.size(); i++) {
    Vec total(0);
    for (int64_t j = 0; j < group; j += L) total = total + Vec::loadu(&xs[i * group + j]);
    sums[i] = sum(total);
  }

  auto units_of = [&](const Tensor& w) { return (w.size(0) + unit - 1) / unit; };
  int64_t units = 0;
  for (const Tensor& w : weights) units += units_of(w);
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    T* out = static_cast<T*>(y.mutable_data_ptr());
    for (size_t i = 0; i < weights.size(); i++) {
      const int64_t N = weights[i].size(0), last = std::min(end * unit, N);
      const void* w = weights[i].const_data_ptr();
      const T* scale = scales.empty() ? nullptr : static_cast<const T*>(scales[i].const_data_ptr());
      for (int64_t row = std::max<int64_t>(begin, 0) * unit; row < last; row += step) {
        if (int4) {
          float block[BLOCK];
          const uint8_t* q = static_cast<const uint8_t*>(w) + row * K / 2;
          dot_int4(block, q, scale + 2 * row, N, xs.data(), sums.data(), K, group);
          std::copy(block, block + BLOCK, out + row);
        } else if (int8) {
          out[row] = T(dot(static_cast<const int8_t*>(w) + row * K, xs.data(), K) * float(scale[row]));
        } else {
          out[row] = T(dot(static_cast<const T*>(w) + row * K, xs.data(), K));
        }
      }
      begin -= units_of(weights[i]), end -= units_of(weights[i]), out += N;  // to the next weight
    }
  });
}

// x of K channels times weights (N, K), or int8 ones and scales (N,), or int4 ones (N, K / 2) and scales and zeros
// (K / group, N, 2): (1, N of all)
Tensor gemv(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales) {
  int64_t N = 0;
  STD_TORCH_CHECK(x.is_contiguous(), "gemv: x is not contiguous");
  for (const Tensor& w : weights) {
    const int64_t K = w.size(1) * (w.scalar_type() == ScalarType::Byte ? 2 : 1);
    STD_TORCH_CHECK(w.is_contiguous() && K == x.numel(), "gemv: a weight is not contiguous, or not of x's width");
    STD_TORCH_CHECK(!scales.empty() || w.scalar_type() == x.scalar_type(), "gemv: a weight is not of x's dtype");
    N += w.size(0);
  }
  Tensor y = torch::stable::new_empty(x, {1, N});
  switch (x.scalar_type()) {
    case ScalarType::Float: multiply<float>(y, x, weights, scales); break;
    case ScalarType::BFloat16: multiply<c10::BFloat16>(y, x, weights, scales); break;
    case ScalarType::Half: multiply<c10::Half>(y, x, weights, scales); break;
    default: STD_TORCH_CHECK(false, "gemv takes float32, bfloat16 or float16");
  }
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(sologpt, CPU, m) { m.impl("gemv", TORCH_BOX(&gemv)); }
