// A stack of decoder layers: pre-norm, rotary attention, gated SiLU MLP (Llama and its relatives).
//
// All layers run in one parallel region: for a single row, opening a region for each operation takes
// longer than the operation.

#pragma once

#include "attention.h"
#include "linear.h"

namespace {

// x / rms(x) * (offset + weight)
struct Norm {
  const float* weight;  // null: none
  float eps, offset;

  // `out` may be `x`; `stride` is that of `out`.
  void operator()(const float* x, float* out, int64_t stride, int64_t size) const {
    vf squares = {};
    float rest = 0.f;
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) squares += load(x + d) * load(x + d);
    for (; d < size; ++d) rest += x[d] * x[d];
    for (int i = 0; i < LANES; ++i) rest += squares[i];
    const float scale = 1.f / std::sqrt(rest / size + eps);
    for (d = 0; d < size; ++d) out[d * stride] = x[d] * scale * (offset + weight[d]);
  }
};

// silu(gate) * up
inline vf silu_mul(vf gate, vf up) {
  const vf e = exponential(gate < 0.f ? gate : -gate);
  const vf sigmoid = (gate < 0.f ? e : vf{} + 1.f) / (1.f + e);
  return gate * sigmoid * up;
}

// Rotary embedding of one head, in place; its two halves form the pairs (as in GPT-NeoX).
void apply_rotary(float* head, const float* cos, const float* sin, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float low = head[d], high = head[d + half];
    head[d] = low * cos[d] - high * sin[d];
    head[d + half] = high * cos[d + half] + low * sin[d + half];
  }
}

struct Layer {
  Norm before_attention, before_mlp, query, key;
  Linear qkv, output, gate_up, down;
  Shape shape;
  LayerKV kv;
};

// Rows that a thread takes at a time.
constexpr int64_t ROW_CHUNK = 4;

// Adds `update`, the output of the layer's last part, to x unless it is null. Then normalises x into
// the layout of the micro-kernel.
void add_and_norm(TeamThread& thread, float* x, const float* update, const Norm& norm,
                  const Rows& normed) {
  thread.parallel_for(normed.m, ROW_CHUNK, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* row = x + r * normed.k;
      for (int64_t d = 0; update && d < normed.k; ++d) row[d] += update[r * normed.k + d];
      norm(row, normed.at(r), normed.stride(r), normed.k);
    }
  });
}

// silu(gate) * up of every row, in the layout of the micro-kernel. The panels of `gate_up` are those
// of the gate, followed by as many of the up projection.
void gated_activation(TeamThread& thread, const Linear& gate_up, const Rows& x, const Rows& inner) {
  const int64_t panels = inner.k / WIDTH;
  std::vector<float> gates(x.m * WIDTH), ups(x.m * WIDTH);
  thread.parallel_for(panels, 1, [&](int64_t p, int64_t) {
    gate_up.panel(x, p, gates.data());
    gate_up.panel(x, panels + p, ups.data());
    for (int64_t r = 0; r < x.m; ++r) {
      const int64_t stride = inner.stride(r);
      float* row = inner.at(r) + p * WIDTH * stride;
      for (int64_t c = 0; c < WIDTH; c += LANES) {
        const vf product = silu_mul(load(gates.data() + r * WIDTH + c), load(ups.data() + r * WIDTH + c));
        for (int i = 0; i < LANES; ++i) row[(c + i) * stride] = product[i];
      }
    }
  });
}

// All layers, in place on x [rows][hidden]; cos and sin are [rows][key_size].
void run_decoder(const Layer* layers, int64_t count, float* x, const float* cos, const float* sin,
                 const AttentionPlan& plan) {
  const Layer& any = layers[0];
  const int64_t m = plan.rows(), hidden = any.qkv.in, qkv_size = any.qkv.out;
  const int64_t heads = any.shape.heads, kv_heads = any.shape.kv_heads, size = any.shape.key_size;
  const int64_t context_size = any.output.in, inner_size = any.down.in;
  const std::unique_ptr<float[]> buffer(new float[m * (2 * hidden + qkv_size + context_size + inner_size)]);
  const Rows normed(buffer.get(), m, hidden);
  float* update = buffer.get() + m * hidden;
  float* qkv = update + m * hidden;
  const Rows context(qkv + m * qkv_size, m, context_size);
  const Rows inner(context.data + m * context_size, m, inner_size);
  const Heads q{qkv, qkv_size, size}, k{qkv + heads * size, qkv_size, size},
      v{qkv + (heads + kv_heads) * size, qkv_size, size};
  parallel_region([&](TeamThread& thread) {
    for (const Layer* layer = layers; layer < layers + count; ++layer) {
      add_and_norm(thread, x, layer == layers ? nullptr : update, layer->before_attention, normed);
      multiply(thread, layer->qkv, normed, qkv);
      thread.parallel_for(m, ROW_CHUNK, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          for (int64_t h = 0; h < heads + kv_heads; ++h) {
            float* head = qkv + r * qkv_size + h * size;
            const Norm& norm = h < heads ? layer->query : layer->key;
            if (norm.weight) norm(head, head, 1, size);
            apply_rotary(head, cos + r * size, sin + r * size, size);
          }
          store_kv(plan, r, k, v, layer->kv, layer->shape);
        }
      });
      attend_batch(thread, plan, q, layer->kv, context, layer->shape, nullptr);
      multiply(thread, layer->output, context, update);
      add_and_norm(thread, x, update, layer->before_mlp, normed);
      gated_activation(thread, layer->gate_up, normed, inner);
      multiply(thread, layer->down, inner, update);
    }
  });
  for (int64_t i = 0; i < m * hidden; ++i) x[i] += update[i];
}

}  // namespace
