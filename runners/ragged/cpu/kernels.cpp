// CPU kernels of the ragged engine: linear layers and attention for the few rows of a decode step.
//
// Both rest on one micro-kernel: up to ROWS rows of activations against WIDTH columns of weights, all
// accumulators in registers, every weight read once per tile. GCC's and Clang's vector types make it
// the same code on AVX-512, AVX2 and NEON. Weights may be float32, bfloat16, float16 or int8 with a
// scale per column; arithmetic is always float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 3;
#else
constexpr int LANES = 8, ROWS = 6;
#endif
constexpr int VECS = 2, WIDTH = LANES * VECS;  // columns of a tile, and of a panel of packed weights
constexpr int BLOCK = 32;                      // tokens of a KV block
static_assert(BLOCK % WIDTH == 0);
constexpr int64_t FEW = 16384;   // numbers that one thread has done before another has woken up
constexpr int64_t DEPTH = 256;    // rows of a panel worked on at a time: 32 KiB, inside L1

template <class T, int N> struct Vec { typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias)); };
using vf = Vec<float, LANES>::type;
using vi = Vec<int32_t, LANES>::type;
using vu = Vec<uint32_t, LANES>::type;

struct bf16 { uint16_t bits; };
using f16 = _Float16;  // needs GCC 12 or Clang 15

inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline vf load(const bf16* p) {
  const auto half = *reinterpret_cast<const Vec<uint16_t, LANES>::type*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(half, vu) << 16);
}
// Compilers turn the generic conversions from 16-bit floats and bytes into scalar code.
#if defined(__AVX512F__)
inline vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vf load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline vf load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
inline vf load(const f16* p) {
  return __builtin_convertvector(*reinterpret_cast<const Vec<f16, LANES>::type*>(p), vf);
}
inline vf load(const int8_t* p) {
  const auto byte = *reinterpret_cast<const Vec<int8_t, LANES>::type*>(p);
  return __builtin_convertvector(__builtin_convertvector(byte, vi), vf);
}
#endif

// e^x for x <= 0, to about one unit in the last place: the polynomial of Cephes' expf.
inline vf exponential(vf given) {
  const vf x = given < -87.f ? vf{} - 87.f : given;
  const vi whole = __builtin_convertvector(x * 1.44269504f - 0.5f, vi);  // truncates: rounds, for x <= 0
  const vf n = __builtin_convertvector(whole, vf);
  const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // Not a denormal number but zero: products with those are two orders of magnitude slower.
  return given < -87.f ? vf{} : p * reinterpret_cast<vf>((whole + 127) << 23);
}

// acc[R][WIDTH] += x[R][depth] @ w[depth][WIDTH]; `next` is fetched into the cache meanwhile.
template <int R, class W>
inline void tile(const float* x, int64_t x_stride, const W* w, int64_t w_stride, int64_t depth,
                 float* acc, int64_t acc_stride, const char* next, int64_t next_step) {
  vf sum[R][VECS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECS; ++v) sum[r][v] = load(acc + r * acc_stride + v * LANES);
  for (int64_t i = 0; i < depth; ++i) {
    if (next_step) __builtin_prefetch(next + i * next_step, 0, 2);
    if (next_step > 64) __builtin_prefetch(next + i * next_step + 64, 0, 2);
    vf column[VECS];
    for (int v = 0; v < VECS; ++v) column[v] = load(w + i * w_stride + v * LANES);
    for (int r = 0; r < R; ++r) {
      const float scalar = x[r * x_stride + i];
      for (int v = 0; v < VECS; ++v) sum[r][v] += scalar * column[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECS; ++v)
      *reinterpret_cast<vf*>(acc + r * acc_stride + v * LANES) = sum[r][v];
}

template <class W>
void rows_by_columns(int64_t rows, const float* x, int64_t x_stride, const W* w, int64_t w_stride,
                     int64_t depth, float* acc, int64_t acc_stride, const char* next = nullptr,
                     int64_t next_step = 0) {
  switch (rows) {
#define TILE(R) case R: if constexpr (R <= ROWS) tile<R>(x, x_stride, w, w_stride, depth, acc, acc_stride, next, next_step); break;
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#undef TILE
  }
}

// Columns from `first` of out[m][n]: what was summed up, scaled, with its bias.
void finish(const float* acc, const float* scale, const float* bias, float* out, int64_t m,
            int64_t n, int64_t first) {
  const int64_t columns = std::min<int64_t>(WIDTH, n - first);
  float factor[WIDTH], shift[WIDTH];
  for (int64_t c = 0; c < columns; ++c) {
    factor[c] = scale ? scale[first + c] : 1.f;
    shift[c] = bias ? bias[first + c] : 0.f;
  }
  for (int64_t r = 0; r < m; ++r, acc += WIDTH) {
    float* y = out + r * n + first;
    if (columns < WIDTH)
      for (int64_t c = 0; c < columns; ++c) y[c] = acc[c] * factor[c] + shift[c];
    else
      for (int64_t c = 0; c < WIDTH; c += LANES)
        *reinterpret_cast<vf*>(y + c) = load(acc + c) * load(factor + c) + load(shift + c);
  }
}

// out[m][n] = x[m][k] @ w^T * scale + bias; w packed as panels [ceil(n / WIDTH)][k][WIDTH].
template <class W>
void linear(const float* x, const W* w, const float* scale, const float* bias, float* out,
            int64_t m, int64_t k, int64_t n) {
  if (m == 0) return;
  const int64_t panels = (n + WIDTH - 1) / WIDTH;
  const int64_t tiles = (m + ROWS - 1) / ROWS, rows = (m + tiles - 1) / tiles;
  const int64_t line = WIDTH * sizeof(W);
#pragma omp parallel
  {
    std::vector<float> acc(m * WIDTH);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      std::fill(acc.begin(), acc.end(), 0.f);
      for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
        const int64_t depth = std::min(DEPTH, k - k0);
        const W* piece = w + (p * k + k0) * WIDTH;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t r = t * rows;
          // One tile alone waits for its own weights: fetch ahead in the stream. Several share the
          // fetching of the piece that comes next, while this one is in the cache.
          const char* ahead = reinterpret_cast<const char*>(piece);
          ahead += tiles == 1 ? 2048 : line * depth + t * (line * depth / tiles);
          rows_by_columns(std::min(rows, m - r), x + r * k + k0, k, piece, WIDTH, depth,
                          acc.data() + r * WIDTH, WIDTH, ahead, std::max<int64_t>(1, line / tiles));
        }
      }
      finish(acc.data(), scale, bias, out, m, n, p * WIDTH);
    }
  }
}

// x / rms(x) * (offset + weight), row by row.
void rms_norm(const float* x, const float* weight, float* out, int64_t size, float eps, float offset) {
  vf squares = {};
  float rest = 0.f;
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) squares += load(x + d) * load(x + d);
  for (; d < size; ++d) rest += x[d] * x[d];
  for (int i = 0; i < LANES; ++i) rest += squares[i];
  const float scale = 1.f / std::sqrt(rest / size + eps);
  for (d = 0; d < size; ++d) out[d] = x[d] * scale * (offset + weight[d]);
}

// silu(gate) * up, where a row holds `size` gates and then `size` ups.
void gated_silu(const float* x, float* out, int64_t size) {
  const float *gate = x, *up = x + size;
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) {
    const vf g = load(gate + d), e = exponential(g < 0.f ? g : -g);
    const vf sigmoid = (g < 0.f ? e : vf{} + 1.f) / (1.f + e);
    *reinterpret_cast<vf*>(out + d) = g * sigmoid * load(up + d);
  }
  for (; d < size; ++d) out[d] = gate[d] / (1.f + std::exp(-gate[d])) * up[d];
}

// How one step's rows lie: row `start + i` of a sequence is its token `past + i`.
struct Segment {
  int32_t start, count, past, table;  // `table`: where its block ids begin
};

struct Shape {
  int64_t heads, kv_heads, key_size, value_size, value_stride;  // value_stride: padded to WIDTH
  int64_t window;                                               // 0: unlimited
  float scale, softcap;                                         // softcap 0: none
};

// Attention of `count` query rows (pairs of token and head of one KV head's group) of a segment.
void attend(const float* q, int64_t q_row, int64_t q_head, const float* keys, const float* values,
            float* out, const Segment& segment, const int32_t* table, const Shape& shape,
            const float* sinks, int64_t kv_head, int64_t first_pair, int64_t count, float* scratch) {
  const int64_t group = shape.heads / shape.kv_heads, dk = shape.key_size, dv = shape.value_stride;
  float* query = scratch;             // [ROWS][dk], contiguous and scaled
  float* acc = query + ROWS * dk;     // [ROWS][dv]
  float* scores = acc + ROWS * dv;    // [ROWS][BLOCK]
  float top[ROWS], sum[ROWS];
  int64_t end[ROWS], begin[ROWS], lowest = INT64_MAX, highest = 0;
  std::fill(acc, acc + count * dv, 0.f);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t token = (first_pair + r) / group, head = kv_head * group + (first_pair + r) % group;
    const float* row = q + (segment.start + token) * q_row + head * q_head;
    for (int64_t d = 0; d < dk; ++d) query[r * dk + d] = row[d] * shape.scale;
    top[r] = sinks ? sinks[head] : -INFINITY;
    sum[r] = sinks ? 1.f : 0.f;
    end[r] = segment.past + token + 1;
    begin[r] = shape.window > 0 ? std::max<int64_t>(0, end[r] - shape.window) : 0;
    lowest = std::min(lowest, begin[r]);
    highest = std::max(highest, end[r]);
  }
  for (int64_t b = lowest / BLOCK; b * BLOCK < highest; ++b) {
    const int64_t at = table[b] * shape.kv_heads + kv_head, from = b * BLOCK;
    std::fill(scores, scores + count * BLOCK, 0.f);
    for (int64_t c = 0; c < BLOCK; c += WIDTH)
      rows_by_columns(count, query, dk, keys + at * dk * BLOCK + c, BLOCK, dk, scores + c, BLOCK);
    for (int64_t r = 0; r < count; ++r) {
      float* s = scores + r * BLOCK;
      if (shape.softcap > 0)
        for (int64_t t = 0; t < BLOCK; ++t) s[t] = std::tanh(s[t] / shape.softcap) * shape.softcap;
      const int64_t low = std::max<int64_t>(begin[r] - from, 0), high = std::min<int64_t>(end[r] - from, BLOCK);
      if (low > 0 || high < BLOCK)  // what the pool holds there may be anything, NaN included
        for (int64_t t = 0; t < BLOCK; ++t) s[t] = t >= low && t < high ? s[t] : -INFINITY;
      vf most = load(s);
      for (int64_t t = LANES; t < BLOCK; t += LANES) most = load(s + t) > most ? load(s + t) : most;
      float best = top[r];
      for (int i = 0; i < LANES; ++i) best = std::max(best, most[i]);
      if (best == -INFINITY) {
        std::fill(s, s + BLOCK, 0.f);
        continue;
      }
      if (best > top[r]) {
        const float shrink = std::exp(top[r] - best);
        sum[r] *= shrink;
        for (int64_t d = 0; d < dv; ++d) acc[r * dv + d] *= shrink;
        top[r] = best;
      }
      vf total = {};
      for (int64_t t = 0; t < BLOCK; t += LANES) {
        const vf weight = exponential(load(s + t) - best);
        *reinterpret_cast<vf*>(s + t) = weight;
        total += weight;
      }
      for (int i = 0; i < LANES; ++i) sum[r] += total[i];
    }
    const int64_t used = std::min<int64_t>(BLOCK, highest - from);
    for (int64_t d = 0; d < dv; d += WIDTH)
      rows_by_columns(count, scores, BLOCK, values + at * BLOCK * dv + d, dv, used, acc + d, dv);
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t token = (first_pair + r) / group, head = kv_head * group + (first_pair + r) % group;
    float* row = out + ((segment.start + token) * shape.heads + head) * shape.value_size;
    for (int64_t d = 0; d < shape.value_size; ++d) row[d] = acc[r * dv + d] / sum[r];
  }
}

// Writes the step's keys and values into their blocks, then attends every row over its sequence.
// Pools: keys [blocks][kv_heads][key_size][BLOCK], values [blocks][kv_heads][BLOCK][value_stride];
// q, k, v are read by (row, head) strides; out is [rows][heads][value_size].
void attention(const float* q, int64_t q_row, int64_t q_head, const float* k, int64_t k_row, int64_t k_head, const float* v, int64_t v_row, int64_t v_head, float* keys,
                        float* values, float* out, const Segment* segments, int64_t count,
                        const int32_t* tables, const Shape* shape, const float* sinks) {
  const int64_t group = shape->heads / shape->kv_heads, dk = shape->key_size;
  struct Task { int64_t segment, kv_head, first, count; };
  std::vector<Task> tasks;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t pairs = segments[s].count * group;
    const int64_t tiles = (pairs + ROWS - 1) / ROWS, rows = (pairs + tiles - 1) / tiles;
    for (int64_t h = 0; h < shape->kv_heads; ++h)
      for (int64_t r = 0; r < pairs; r += rows) tasks.push_back({s, h, r, std::min(rows, pairs - r)});
  }
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < count * shape->kv_heads; ++task) {
      const Segment& segment = segments[task / shape->kv_heads];
      const int64_t h = task % shape->kv_heads;
      for (int64_t i = 0; i < segment.count; ++i) {
        const int64_t token = segment.past + i, offset = token % BLOCK;
        const int64_t at = tables[segment.table + token / BLOCK] * shape->kv_heads + h;
        const float* key = k + (segment.start + i) * k_row + h * k_head;
        const float* value = v + (segment.start + i) * v_row + h * v_head;
        for (int64_t d = 0; d < dk; ++d) keys[(at * dk + d) * BLOCK + offset] = key[d];
        std::memcpy(values + (at * BLOCK + offset) * shape->value_stride, value,
                    shape->value_size * sizeof(float));
      }
    }
    std::vector<float> scratch(ROWS * (dk + shape->value_stride + BLOCK));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < static_cast<int64_t>(tasks.size()); ++i) {
      const Task& task = tasks[i];
      const Segment& segment = segments[task.segment];
      attend(q, q_row, q_head, keys, values, out, segment, tables + segment.table, *shape, sinks,
             task.kv_head, task.first, task.count, scratch.data());
    }
  }
}

struct Linear {
  const void* weight;
  const float *scale, *bias;
  int64_t in, out, type;  // 0 float32, 1 bfloat16, 2 float16, 3 int8

  void operator()(const float* x, float* y, int64_t rows) const {
    switch (type) {
      case 0: return linear(x, static_cast<const float*>(weight), scale, bias, y, rows, in, out);
      case 1: return linear(x, static_cast<const bf16*>(weight), scale, bias, y, rows, in, out);
      case 2: return linear(x, static_cast<const f16*>(weight), scale, bias, y, rows, in, out);
      case 3: return linear(x, static_cast<const int8_t*>(weight), scale, bias, y, rows, in, out);
    }
  }
};

struct Norm {
  const float* weight;  // null: none
  float eps, offset;

  void operator()(const float* x, float* y, int64_t rows, int64_t size) const {
#pragma omp parallel for if (rows * size > FEW)
    for (int64_t r = 0; r < rows; ++r) rms_norm(x + r * size, weight, y + r * size, size, eps, offset);
  }
};

struct Layer {
  Norm before_attention, before_mlp, query, key;
  Linear qkv, output, gate_up, down;
  Shape shape;
};

void add(float* x, const float* y, int64_t count) {
#pragma omp parallel for simd if (parallel : count > FEW)
  for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

// Rotary embedding of one head, halves rotated against each other (RoPE as in GPT-NeoX).
void rotate(float* head, const float* cos, const float* sin, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float low = head[d], high = head[d + half];
    head[d] = low * cos[d] - high * sin[d];
    head[d + half] = high * cos[d + half] + low * sin[d + half];
  }
}

}  // namespace

extern "C" {

int triptych_panel_width() { return WIDTH; }
int triptych_block_size() { return BLOCK; }

#define LINEAR(NAME, TYPE)                                                                           \
  void triptych_linear_##NAME(const float* x, const void* w, const float* scale, const float* bias, \
                              float* out, int64_t m, int64_t k, int64_t n) {                         \
    linear(x, static_cast<const TYPE*>(w), scale, bias, out, m, k, n);                               \
  }
LINEAR(float32, float)
LINEAR(bfloat16, bf16)
LINEAR(float16, f16)
LINEAR(int8, int8_t)

void triptych_rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t size,
                       float eps, float offset) {
#pragma omp parallel for if (rows * size > FEW)
  for (int64_t r = 0; r < rows; ++r) rms_norm(x + r * size, weight, out + r * size, size, eps, offset);
}

// x [rows][2 * size] -> out [rows][size]
void triptych_gated_silu(const float* x, float* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > FEW)
  for (int64_t r = 0; r < rows; ++r) gated_silu(x + r * 2 * size, out + r * size, size);
}

void triptych_attention(const float* q, int64_t q_row, int64_t q_head, const float* k, int64_t k_row,
                        int64_t k_head, const float* v, int64_t v_row, int64_t v_head, float* keys,
                        float* values, float* out, const Segment* segments, int64_t count,
                        const int32_t* tables, const Shape* shape, const float* sinks) {
  attention(q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, keys, values, out, segments, count,
            tables, shape, sinks);
}

// A whole pre-norm decoder layer with rotary attention and a gated MLP, in place on x [rows][hidden].
// cos, sin are [rows][key_size]; scratch holds rows * (2 * hidden + qkv.out + output.in + 3 * down.in).
void triptych_decoder_layer(const Layer* layer, float* x, int64_t rows, const float* cos,
                            const float* sin, float* keys, float* values, const Segment* segments,
                            int64_t count, const int32_t* tables, float* scratch) {
  const Shape& shape = layer->shape;
  const int64_t hidden = layer->qkv.in, wide = layer->qkv.out, inner = layer->down.in;
  const int64_t size = shape.key_size, rotated = shape.heads + shape.kv_heads;
  float *normed = scratch, *added = normed + rows * hidden, *qkv = added + rows * hidden;
  float *attended = qkv + rows * wide, *both = attended + rows * layer->output.in, *gated = both + rows * 2 * inner;
  layer->before_attention(x, normed, rows, hidden);
  layer->qkv(normed, qkv, rows);
#pragma omp parallel for if (rows * wide > FEW)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < rotated; ++h) {
      float* head = qkv + r * wide + h * size;
      const Norm& norm = h < shape.heads ? layer->query : layer->key;
      if (norm.weight) rms_norm(head, norm.weight, head, size, norm.eps, norm.offset);
      rotate(head, cos + r * size, sin + r * size, size);
    }
  const float *k = qkv + shape.heads * size, *v = k + shape.kv_heads * size;
  attention(qkv, wide, size, k, wide, size, v, wide, shape.value_size, keys, values, attended, segments,
            count, tables, &shape, nullptr);
  layer->output(attended, added, rows);
  add(x, added, rows * hidden);
  layer->before_mlp(x, normed, rows, hidden);
  layer->gate_up(normed, both, rows);
  triptych_gated_silu(both, gated, rows, inner);
  layer->down(gated, added, rows);
  add(x, added, rows * hidden);
}

}  // extern "C"
