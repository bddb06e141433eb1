// gpt.py for a few tokens on a CPU: what `GPT.step` computes, in one call and in float32, by the same names.
//
// products.h multiplies by the weights, which takes most of the time. Here is the rest: the layers, then the
// network, from token ids to logits, with keys and values in the caller's KVCache. native.py compiles it.
// Shapes in the comments are those of gpt.py: B rows with T new tokens each, M = B * T tokens, C = n_embd,
// H = n_head, G = n_kv_head, D = head_dim, V = vocab_size.

#include "products.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace {

constexpr int64_t MAX_TOKENS = 32;  // in one call

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// ---- Layers ----

// RMSNorm or LayerNorm of C channels. Gains and biases are empty where it has none
struct Norm {
  bool is_layer_norm;
  float eps;
  Floats weight, bias;

  void operator()(const float* x, float* y, int64_t C) const {
    float mean = 0, square = 0;
    if (is_layer_norm) {
      for (int64_t c = 0; c < C; c++) mean += x[c];
      mean /= C;
    }
    for (int64_t c = 0; c < C; c++) square += (x[c] - mean) * (x[c] - mean);
    const float scale = 1 / std::sqrt(square / C + eps);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * scale;
    for (size_t c = 0; c < weight.size(); c++) y[c] *= weight[c];
    for (size_t c = 0; c < bias.size(); c++) y[c] += bias[c];
  }
};

// Rotate neighbouring channels of x (D,), as complex numbers, by rotary (D/2, 2)
void rotate(float* x, const float* rotary, int64_t D) {
  for (int64_t i = 0; i < D; i += 2) {
    const float a = x[i], b = x[i + 1], c = rotary[i], d = rotary[i + 1];
    x[i] = a * c - b * d, x[i + 1] = a * d + b * c;
  }
}

// x = f(x), a vector at a time
template <class F>
void map(float* x, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += L) {
    const int count = std::min<int64_t>(L, n - i);
    f(Vec::loadu(x + i, count)).store(x + i, count);
  }
}

// y = weights (S,) times W * L columns of v (S, D)
template <int W, class T>
void add_values(const float* weights, const T* v, int64_t S, int64_t D, float* y) {
  Vec sums[W];
  std::fill_n(sums, W, Vec(0));
  for (int64_t s = 0; s < S; s++) {
    const Vec weight(weights[s]);
    for (int i = 0; i < W; i++) sums[i] = fmadd(widen(v + s * D + i * L), weight, sums[i]);
  }
  for (int i = 0; i < W; i++) sums[i].store(y + i * L);
}

// softmax(q k^T / sqrt(D)) v of one head: q (D,), k and v (S, D), to y (D,)
template <class T>
void attend(const float* q, const T* k, const T* v, int64_t S, int64_t D, float* y) {
  Floats weights((S + L - 1) / L * L, -INFINITY);  // whole vectors
  int64_t s = 0;
  for (; s + 4 <= S; s += 4) dot<4, 1>(k + s * D, q, D, &weights[s]);
  for (; s < S; s++) dot<1, 1>(k + s * D, q, D, &weights[s]);
  const float most = *std::max_element(weights.begin(), weights.end());
  const float scale = 1 / std::sqrt(float(D));
  Vec total(0);
  for (s = 0; s < S; s += L) {
    Vec weight = ((Vec::loadu(&weights[s]) - Vec(most)) * Vec(scale)).exp();
    weight.store(&weights[s]);
    total = total + weight;
  }
  map(weights.data(), weights.size(), [scale = Vec(1 / sum(total))](Vec weight) { return weight * scale; });
  int64_t d = 0;
  for (; d + 8 * L <= D; d += 8 * L) add_values<8>(weights.data(), v + d, S, D, y + d);
  for (; d + L <= D; d += L) add_values<1>(weights.data(), v + d, S, D, y + d);
  for (; d < D; d++) {
    y[d] = 0;
    for (s = 0; s < S; s++) y[d] += weights[s] * float(v[s * D + d]);
  }
}

void activate(const std::string& mlp, float* x, int64_t n) {
  const Vec zero(0), half(0.5), one(1);
  if (mlp == "relu2") {
    map(x, n, [&](Vec x) { return at::vec::maximum(x, zero) * at::vec::maximum(x, zero); });
  } else if (mlp == "gelu") {
    map(x, n, [&](Vec x) { return half * x * (one + (x * Vec(M_SQRT1_2)).erf()); });
  } else if (mlp == "gelu_tanh" || mlp == "geglu") {
    const Vec a(M_SQRT2 * M_2_SQRTPI / 2), b(0.044715);
    map(x, n, [&](Vec x) { return half * x * (one + (a * (x + b * x * x * x)).tanh()); });
  } else {
    STD_TORCH_CHECK(mlp == "swiglu", "decode: mlp ", mlp, " is not known here");
    map(x, n, [&](Vec x) { return x / (one + x.neg().exp()); });
  }
}

// ---- The network ----

// The fields of GPTConfig that no tensor's shape tells
struct Config {
  int64_t vocab_size, n_embd, n_head, n_hidden;
  std::string mlp, norm, layer_types;
  int64_t sliding_window;  // 0 is all
  bool learned_positions, qk_norm, embd_norm, embd_scale, post_norm, norm_weight, bias, qkv_bias, tie_embd;
  double norm_eps, softcap;
};

// The model's tensors, read one after the other, in the order in which its modules have them
struct Weights {
  const Config& config;
  const std::vector<Tensor>& tensors;
  size_t next = 0;

  const Tensor& take() {
    STD_TORCH_CHECK(next < tensors.size(), "decode: the model has too few weights");
    const Tensor& tensor = tensors[next++];
    STD_TORCH_CHECK(tensor.is_contiguous(), "decode: a weight is not contiguous");
    return tensor;
  }

  Floats vector(int64_t n) {
    const Tensor& from = take();
    STD_TORCH_CHECK(from.dim() == 1 && from.size(0) == n, "decode: a gain or bias is not of size ", n);
    Floats to(n);
    with_type(from.scalar_type(), [&](auto T) { widen(pointer<decltype(T)>(from), n, to.data()); });
    return to;
  }

  Norm norm(int64_t C) {
    Norm norm{config.norm == "layer", float(config.norm_eps), {}, {}};
    if (config.norm_weight) norm.weight = vector(C);
    if (config.norm_weight && norm.is_layer_norm && config.bias) norm.bias = vector(C);
    return norm;
  }

  Linear linear(int64_t N, int64_t K, bool has_bias) {
    const Tensor& from = take();
    Linear to{N, K, K, from.scalar_type(), from.scalar_type(), from.const_data_ptr()};
    const bool int8 = to.dtype == ScalarType::Char, int4 = to.dtype == ScalarType::Byte;
    bool fits = from.dim() == 2 && from.size(0) == (int4 ? N / 8 : N) && from.size(1) == (int4 ? 4 * K : K);
    if (int8 || int4) {
      const Tensor& scale = take();
      to.scale = scale.const_data_ptr(), to.scale_dtype = scale.scalar_type();
      const int64_t groups = int4 && scale.dim() == 4 ? scale.size(1) : 1;
      to.group = K / std::max<int64_t>(groups, 1);
      fits = fits && scale.size(0) == from.size(0) && scale.numel() == (int4 ? 2 * groups : 1) * N;
      fits = fits && (int8 || (to.group * groups == K && to.group % GROUP == 0 && N % 8 == 0));
    }
    STD_TORCH_CHECK(fits, "decode: a weight is not ", N, " x ", K);
    with_type(to.scale_dtype, [](auto) {});  // or it is an error here, not in a thread
    if (has_bias) to.bias = vector(N);
    return to;
  }
};

// A KVCache, or some rows of one: keys and values (n_layer, B, G, max_len, D), ids (B, max_len), lengths (B,)
struct KVCache {
  Tensor k, v, ids, lengths;
  int64_t B = k.size(1), G = k.size(2), max_len = k.size(3), D = k.size(4);

  int64_t& length(int64_t b) const { return pointer<int64_t>(lengths)[b * lengths.stride(0)]; }

  template <class T>
  static T* slots(const Tensor& x, int64_t layer, int64_t b, int64_t g) {  // (max_len, D)
    return pointer<T>(x) + layer * x.stride(0) + b * x.stride(1) + g * x.stride(2);
  }

  void check(const Tensor& idx, const Tensor& rotary, const Config& config) const {
    bool fits = v.dim() == 5 && ids.dim() == 2 && lengths.dim() == 1 && idx.dim() == 2 && idx.is_contiguous();
    for (int i = 0; fits && i < 5; i++) fits = k.size(i) == v.size(i) && k.stride(i) == v.stride(i);
    fits = fits && k.size(0) == int64_t(config.layer_types.size()) && D > 0;
    fits = fits && G > 0 && config.n_head % G == 0 && config.sliding_window >= 0;
    fits = fits && k.stride(4) == 1 && k.stride(3) == D && k.scalar_type() == v.scalar_type();
    fits = fits && ids.size(0) == B && ids.size(1) == max_len && ids.stride(1) == 1 && lengths.size(0) == B;
    for (auto& each : {ids, lengths, idx}) fits = fits && each.scalar_type() == ScalarType::Long;
    fits = fits && idx.size(0) == B && idx.numel() > 0 && idx.numel() <= MAX_TOKENS;
    const int64_t T = fits ? idx.size(1) : 0;
    for (int64_t b = 0; fits && b < B; b++) {
      fits = length(b) >= 0 && length(b) <= max_len - T;
      fits = fits && (config.learned_positions || (length(b) + T) * D <= rotary.numel());
    }
    fits = fits && rotary.scalar_type() == ScalarType::Float && rotary.is_contiguous();
    STD_TORCH_CHECK(fits, "decode: the tokens do not fit into this KVCache");
  }
};

// x (M, C) = rows ids (M,) of an embedding
void embed(const Linear& table, const int64_t* ids, int64_t M, float* x) {
  const int64_t C = table.K;
  STD_TORCH_CHECK(table.dtype != ScalarType::Byte, "decode: an embedding has at least 8 bits");
  for (int64_t m = 0; m < M; m++) {
    const int64_t id = ids[m];
    STD_TORCH_CHECK(id >= 0 && id < table.N, "decode: id or position ", id, " of ", table.N);
    with_type(table.scale_dtype, [&](auto type) {
      using T = decltype(type);
      if (table.dtype == ScalarType::Char) {
        const float scale = static_cast<const T*>(table.scale)[id];
        const int8_t* q = static_cast<const int8_t*>(table.w) + id * C;
        for (int64_t c = 0; c < C; c++) x[m * C + c] = q[c] * scale;
      } else {
        widen(static_cast<const T*>(table.w) + id * C, C, x + m * C);
      }
    });
  }
}

void normalize(const Norm& norm, const Floats& x, Tokens& y, int64_t M) {
  for (int64_t m = 0; m < M; m++) norm(&x[m * y.K], &y.x[m * y.K], y.K);
}

// Normalize each row of x (M, C)
void normalize(const Norm& norm, Floats& x, int64_t C) {
  for (size_t i = 0; i < x.size(); i += C) norm(&x[i], &x[i], C);
}

// x (M, C) += attention(norm(x)). The new keys and values go into the cache
void attention(Weights& weights, int64_t layer, const KVCache& cache, const Tensor& rotary, int64_t T,
               Floats& x) {
  const Config& config = weights.config;
  const int64_t C = config.n_embd, H = config.n_head, G = cache.G, D = cache.D, M = cache.B * T;
  const char kind = config.layer_types[layer];
  const bool is_rotary = !config.learned_positions && kind != 'N';
  const int64_t window = kind == 'S' && config.sliding_window ? config.sliding_window : cache.max_len;
  const bool qkv_bias = config.bias || config.qkv_bias;

  const Norm norm = weights.norm(C);
  const Linear c_q = weights.linear(H * D, C, qkv_bias), c_k = weights.linear(G * D, C, qkv_bias);
  const Linear c_v = weights.linear(G * D, C, qkv_bias), c_proj = weights.linear(C, H * D, config.bias);
  const Norm q_norm = config.qk_norm ? weights.norm(D) : Norm();
  const Norm k_norm = config.qk_norm ? weights.norm(D) : Norm();
  const Norm post_norm = config.post_norm ? weights.norm(C) : Norm();

  Tokens normed(M, C), y(M, H * D);
  Floats q(M * H * D), k(M * G * D), v(M * G * D), out(M * C);
  normalize(norm, x, normed, M);
  linear(normed, M, {{&c_q, q.data()}, {&c_k, k.data()}, {&c_v, v.data()}});
  with_type(cache.k.scalar_type(), [&](auto type) {
    using Type = decltype(type);
    for (int64_t m = 0; m < M; m++) {
      const int64_t b = m / T, position = cache.length(b) + m % T;
      for (int64_t h = 0; h < H + G; h++) {
        float* head = h < H ? &q[(m * H + h) * D] : &k[(m * G + h - H) * D];
        if (config.qk_norm) (h < H ? q_norm : k_norm)(head, head, D);
        if (is_rotary) rotate(head, pointer<float>(rotary) + position * D, D);
      }
      for (int64_t g = 0; g < G; g++) {
        std::copy_n(&k[(m * G + g) * D], D, cache.slots<Type>(cache.k, layer, b, g) + position * D);
        std::copy_n(&v[(m * G + g) * D], D, cache.slots<Type>(cache.v, layer, b, g) + position * D);
      }
    }
    parallel_for(0, M * H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t m = i / H, b = m / T, g = i % H / (H / G), S = cache.length(b) + m % T + 1;
        const int64_t first = std::max<int64_t>(S - window, 0);
        const Type* keys = cache.slots<Type>(cache.k, layer, b, g) + first * D;
        const Type* values = cache.slots<Type>(cache.v, layer, b, g) + first * D;
        attend(&q[i * D], keys, values, S - first, D, &y.x[i * D]);
      }
    });
  });
  linear(y, M, {{&c_proj, out.data()}});
  if (config.post_norm) normalize(post_norm, out, C);
  for (int64_t i = 0; i < M * C; i++) x[i] += out[i];
}

// x (M, C) += mlp(norm(x))
void mlp(Weights& weights, int64_t M, Floats& x) {
  const Config& config = weights.config;
  const int64_t C = config.n_embd, hidden = config.n_hidden;
  const bool has_gate = config.mlp == "swiglu" || config.mlp == "geglu";
  const Norm norm = weights.norm(C);
  const Linear c_fc = weights.linear(hidden, C, config.bias), c_proj = weights.linear(C, hidden, config.bias);
  const Linear c_gate = has_gate ? weights.linear(hidden, C, config.bias) : Linear();
  const Norm post_norm = config.post_norm ? weights.norm(C) : Norm();

  Tokens normed(M, C), y(M, hidden);
  Floats up(has_gate ? M * hidden : 0), out(M * C);
  normalize(norm, x, normed, M);
  if (has_gate) {
    linear(normed, M, {{&c_gate, y.x.data()}, {&c_fc, up.data()}});
  } else {
    linear(normed, M, {{&c_fc, y.x.data()}});
  }
  activate(config.mlp, y.x.data(), M * hidden);
  for (size_t i = 0; i < up.size(); i++) y.x[i] *= up[i];
  linear(y, M, {{&c_proj, out.data()}});
  if (config.post_norm) normalize(post_norm, out, C);
  for (int64_t i = 0; i < M * C; i++) x[i] += out[i];
}

// Read idx (B, T) after what the cache holds. Return the logits (B, T, V), or those of each row's last token
Tensor decode(Tensor idx, Tensor k, Tensor v, Tensor cached_ids, Tensor lengths, Tensor rotary,
              Tensor window_rotary, std::vector<Tensor> tensors, int64_t vocab_size, int64_t n_embd,
              int64_t n_head, int64_t n_hidden, std::string mlp_kind, std::string norm_kind,
              std::string layer_types, int64_t sliding_window, bool learned_positions, bool qk_norm,
              bool embd_norm, bool embd_scale, bool post_norm, bool norm_weight, bool bias, bool qkv_bias,
              bool tie_embd, double norm_eps, double softcap, bool is_last) {
  const Config config{vocab_size,  n_embd,         n_head,            n_hidden, mlp_kind,  norm_kind,
                      layer_types, sliding_window, learned_positions, qk_norm,  embd_norm, embd_scale,
                      post_norm,   norm_weight,    bias,              qkv_bias, tie_embd,  norm_eps,
                      softcap};
  const KVCache cache{k, v, cached_ids, lengths};
  for (auto& each : {rotary, window_rotary}) cache.check(idx, each, config);
  Weights weights{config, tensors};
  const int64_t C = n_embd, V = vocab_size, B = cache.B, T = idx.size(1), M = B * T;
  const int64_t* ids = pointer<int64_t>(idx);

  const Linear wte = weights.linear(V, C, false);
  Floats x(M * C), position(C);
  embed(wte, ids, M, x.data());
  if (embd_scale) {
    with_type(wte.scale_dtype, [&](auto type) {
      const float scale = decltype(type)(std::sqrt(double(C)));  // rounded, as in gpt.py
      for (float& each : x) each *= scale;
    });
  }
  if (learned_positions) {
    const int64_t longest = weights.next < tensors.size() ? tensors[weights.next].size(0) : 0;
    const Linear wpe = weights.linear(longest, C, false);
    for (int64_t m = 0; m < M; m++) {
      const int64_t at = cache.length(m / T) + m % T;
      embed(wpe, &at, 1, position.data());
      for (int64_t c = 0; c < C; c++) x[m * C + c] += position[c];
    }
  }
  if (embd_norm) normalize(weights.norm(C), x, C);
  for (size_t layer = 0; layer < layer_types.size(); layer++) {
    attention(weights, layer, cache, layer_types[layer] == 'S' ? window_rotary : rotary, T, x);
    mlp(weights, M, x);
  }
  const Norm norm = weights.norm(C);
  const Linear head = tie_embd ? wte : weights.linear(V, C, false);
  STD_TORCH_CHECK(weights.next == tensors.size(), "decode: the model has weights that are not known here");

  const int64_t wanted = is_last ? 1 : T;
  for (int64_t b = 0; is_last && b < B; b++) std::copy_n(&x[((b + 1) * T - 1) * C], C, &x[b * C]);
  Tokens normed(B * wanted, C);
  normalize(norm, x, normed, B * wanted);
  Tensor logits = torch::stable::new_empty(idx, {B, wanted, V}, ScalarType::Float);
  float* y = pointer<float>(logits);
  linear(normed, B * wanted, {{&head, y}});
  if (softcap) {
    const Vec cap(softcap);
    parallel_for(0, B * wanted * V, 4096, [&](int64_t begin, int64_t end) {
      map(y + begin, end - begin, [&](Vec x) { return cap * (x / cap).tanh(); });
    });
  }
  for (int64_t m = 0; m < M; m++) {
    pointer<int64_t>(cached_ids)[m / T * cached_ids.stride(0) + cache.length(m / T) + m % T] = ids[m];
  }
  for (int64_t b = 0; b < B; b++) cache.length(b) += T;
  return logits;
}

// x (M, K) times the weights (N, K) of one Linear, with a scale if they are quantized: (M, N), all in float32
Tensor linear_of_tokens(Tensor x, std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.numel() > 0,
                  "linear takes float32 (M, K)");
  STD_TORCH_CHECK(!tensors.empty(), "linear takes a weight");
  const bool int4 = tensors[0].scalar_type() == ScalarType::Byte;
  const int64_t M = x.size(0), K = x.size(1), N = tensors[0].size(0) * (int4 ? 8 : 1);
  const Config config{};
  const Linear weight = Weights{config, tensors}.linear(N, K, false);
  Tokens tokens(M, K);
  std::copy_n(pointer<float>(x), M * K, tokens.x.begin());
  Tensor y = torch::stable::new_empty(x, {M, N});
  linear(tokens, M, {{&weight, pointer<float>(y)}});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sologpt, m) {
  m.def(
      "decode(Tensor idx, Tensor(a!) k, Tensor(b!) v, Tensor(c!) cached_ids, Tensor(d!) lengths, "
      "Tensor rotary, Tensor window_rotary, Tensor[] weights, int vocab_size, int n_embd, int n_head, "
      "int n_hidden, str mlp, str norm, str layer_types, int sliding_window, bool learned_positions, "
      "bool qk_norm, bool embd_norm, bool embd_scale, bool post_norm, bool norm_weight, bool bias, "
      "bool qkv_bias, bool tie_embd, float norm_eps, float softcap, bool is_last) -> Tensor");
  m.def("linear(Tensor x, Tensor[] weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sologpt, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("linear", TORCH_BOX(&linear_of_tokens));
}
