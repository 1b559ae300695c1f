// A whole stack of decoder layers: pre-norm, rotary attention, gated SiLU MLP (Llama and its kin).
//
// One parallel region for all of them: opening one for each operation takes longer than the
// operation, with one row.

#pragma once

#include "attention.h"
#include "linear.h"

namespace {

// x / rms(x) * (offset + weight)
struct Norm {
  const float* weight;  // null: none
  float eps, offset;

  // `out` may be `x`; its numbers lie `step` apart.
  void operator()(const float* x, float* out, int64_t step, int64_t size) const {
    vf squares = {};
    float rest = 0.f;
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) squares += load(x + d) * load(x + d);
    for (; d < size; ++d) rest += x[d] * x[d];
    for (int i = 0; i < LANES; ++i) rest += squares[i];
    const float scale = 1.f / std::sqrt(rest / size + eps);
    for (d = 0; d < size; ++d) out[d * step] = x[d] * scale * (offset + weight[d]);
  }
};

// silu(gate) * up
inline vf gated(vf gate, vf up) {
  const vf e = exponential(gate < 0.f ? gate : -gate);
  const vf sigmoid = (gate < 0.f ? e : vf{} + 1.f) / (1.f + e);
  return gate * sigmoid * up;
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

struct Layer {
  Norm before_attention, before_mlp, query, key;
  Linear qkv, output, gate_up, down;
  Shape shape;
  Pool pool;
};

// Rows that one thread takes at a time.
constexpr int64_t FEW_ROWS = 4;

// x += added, unless that is null, and its norm laid out for the micro-kernel.
void add_and_norm(Member& member, float* x, const float* added, const Norm& norm, const Rows& normed) {
  member.share(normed.m, FEW_ROWS, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* row = x + r * normed.k;
      for (int64_t d = 0; added && d < normed.k; ++d) row[d] += added[r * normed.k + d];
      norm(row, normed.at(r), normed.step(r), normed.k);
    }
  });
}

// silu(gate) * up of every row, laid out for the micro-kernel: `inner` gates' panels, then the ups'.
void gate(Member& member, const Linear& gate_up, const Rows& x, const Rows& inner) {
  const int64_t panels = inner.k / WIDTH;
  std::vector<float> gates(x.m * WIDTH), ups(x.m * WIDTH);
  member.share(panels, 1, [&](int64_t p, int64_t) {
    gate_up.panel(x, p, gates.data());
    gate_up.panel(x, panels + p, ups.data());
    for (int64_t r = 0; r < x.m; ++r) {
      float* row = inner.at(r) + p * WIDTH * inner.step(r);
      for (int64_t c = 0; c < WIDTH; c += LANES) {
        const vf made = gated(load(gates.data() + r * WIDTH + c), load(ups.data() + r * WIDTH + c));
        for (int i = 0; i < LANES; ++i) row[(c + i) * inner.step(r)] = made[i];
      }
    }
  });
}

// In place on x [rows][hidden]; cos and sin are [rows][key_size].
void decode(const Layer* layers, int64_t count, float* x, const float* cos, const float* sin, const Plan& plan) {
  const Layer& any = layers[0];
  const int64_t m = plan.rows(), hidden = any.qkv.in, wide = any.qkv.out;
  const int64_t heads = any.shape.heads, kv_heads = any.shape.kv_heads, size = any.shape.key_size;
  const int64_t attended_size = any.output.in, inner_size = any.down.in;
  const std::unique_ptr<float[]> room(new float[m * (2 * hidden + wide + attended_size + inner_size)]);
  const Rows normed(room.get(), m, hidden);
  float* added = room.get() + m * hidden;
  float* qkv = added + m * hidden;
  const Rows attended(qkv + m * wide, m, attended_size), inner(attended.data + m * attended_size, m, inner_size);
  const Heads q{qkv, wide, size}, k{qkv + heads * size, wide, size}, v{qkv + (heads + kv_heads) * size, wide, size};
  together([&](Member& member) {
    for (const Layer* layer = layers; layer < layers + count; ++layer) {
      add_and_norm(member, x, layer == layers ? nullptr : added, layer->before_attention, normed);
      multiply(member, layer->qkv, normed, qkv);
      member.share(m, FEW_ROWS, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          for (int64_t h = 0; h < heads + kv_heads; ++h) {
            float* head = qkv + r * wide + h * size;
            const Norm& norm = h < heads ? layer->query : layer->key;
            if (norm.weight) norm(head, head, 1, size);
            rotate(head, cos + r * size, sin + r * size, size);
          }
          store(plan, r, k, v, layer->pool, layer->shape);
        }
      });
      attend_all(member, plan, q, layer->pool, attended, layer->shape, nullptr);
      multiply(member, layer->output, attended, added);
      add_and_norm(member, x, added, layer->before_mlp, normed);
      gate(member, layer->gate_up, normed, inner);
      multiply(member, layer->down, inner, added);
    }
  });
  for (int64_t i = 0; i < m * hidden; ++i) x[i] += added[i];
}

}  // namespace
