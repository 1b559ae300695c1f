// Attention of a batch's rows over the paged KV cache.

#pragma once

#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int BLOCK = 32;  // tokens of a KV block
static_assert(BLOCK % WIDTH == 0);

// The rows of one sequence in a batch: row `start + i` is its token `past + i`.
struct Segment {
  int32_t start, count, past, table;  // table: index of its first block id
};

struct Shape {
  int64_t heads, kv_heads, key_size, value_size, value_stride;  // value_stride: padded value_size
  int64_t window;                                               // 0: unlimited
  float scale, softcap;                                         // softcap 0: none
};

// One vector per row and head of a strided tensor.
struct Heads {
  const float* data;
  int64_t row, head;  // strides

  const float* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

// The KV blocks of one layer: keys [blocks][kv_heads][key_size][BLOCK], values
// [blocks][kv_heads][BLOCK][value_stride].
struct LayerKV {
  float *keys, *values;
};

// Attention of `count` queries of a segment; a query is a pair of a token and a head that shares
// the KV head.
void attend(const Heads& q, const LayerKV& kv, const Rows& out,
            const Segment& segment, const int32_t* table, const Shape& shape, const float* sinks,
            int64_t kv_head, int64_t first_pair, int64_t count, float* scratch) {
  const int64_t group = shape.heads / shape.kv_heads, dk = shape.key_size, dv = shape.value_stride;
  float* query = scratch;             // [dk][count], scaled
  float* acc = query + ROWS * dk;     // [ROWS][dv]
  float* scores = acc + ROWS * dv;    // [ROWS][BLOCK]
  float top[ROWS], sum[ROWS];
  int64_t end[ROWS], begin[ROWS], lowest = INT64_MAX, highest = 0;
  std::fill(acc, acc + count * dv, 0.f);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t token = (first_pair + r) / group, head = kv_head * group + (first_pair + r) % group;
    const float* row = q.at(segment.start + token, head);
    for (int64_t d = 0; d < dk; ++d) query[d * count + r] = row[d] * shape.scale;
    top[r] = sinks ? sinks[head] : -INFINITY;
    sum[r] = sinks ? 1.f : 0.f;
    end[r] = segment.past + token + 1;
    begin[r] = shape.window > 0 ? std::max<int64_t>(0, end[r] - shape.window) : 0;
    lowest = std::min(lowest, begin[r]);
    highest = std::max(highest, end[r]);
  }
  // Bytes of values to prefetch with each row of keys, and of keys with each row of values.
  const int64_t value_step = BLOCK * dv * 4 / (dk * (BLOCK / WIDTH)), key_step = dk * 4 / (dv / WIDTH);
  for (int64_t b = lowest / BLOCK; b * BLOCK < highest; ++b) {
    const int64_t at = table[b] * shape.kv_heads + kv_head, from = b * BLOCK;
    std::fill(scores, scores + count * BLOCK, 0.f);
    // Reading the keys prefetches the block's values; reading the values, the next block's keys.
    const char* values_ahead = reinterpret_cast<const char*>(kv.values + at * BLOCK * dv);
    for (int64_t c = 0; c < BLOCK; c += WIDTH)
      rows_by_columns(count, query, kv.keys + at * dk * BLOCK + c, BLOCK, dk, scores + c, BLOCK,
                      values_ahead + c * value_step * dk / WIDTH, value_step);
    for (int64_t r = 0; r < count; ++r) {
      float* s = scores + r * BLOCK;
      if (shape.softcap > 0)
        for (int64_t t = 0; t < BLOCK; ++t) s[t] = std::tanh(s[t] / shape.softcap) * shape.softcap;
      const int64_t low = std::max<int64_t>(begin[r] - from, 0), high = std::min<int64_t>(end[r] - from, BLOCK);
      if (low > 0 || high < BLOCK)  // other positions may have any content, NaN included
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
    const int64_t next = (b + 1) * BLOCK < highest ? table[b + 1] * shape.kv_heads + kv_head : at;
    const char* keys_ahead = reinterpret_cast<const char*>(kv.keys + next * dk * BLOCK);
    for (int64_t d = 0; d < dv; d += WIDTH)
      rows_by_columns<BLOCK>(count, scores, kv.values + at * BLOCK * dv + d, dv, used, acc + d, dv,
                             keys_ahead + d * key_step * BLOCK / WIDTH, key_step);
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t token = (first_pair + r) / group, head = kv_head * group + (first_pair + r) % group;
    const int64_t stride = out.stride(segment.start + token);
    float* row = out.at(segment.start + token) + head * shape.value_size * stride;
    for (int64_t d = 0; d < shape.value_size; ++d) row[d * stride] = acc[r * dv + d] / sum[r];
  }
}

// The KV slots of a batch's rows, and their attention as tasks; the same for every layer.
struct AttentionPlan {
  struct Task { int64_t segment, kv_head, first, count; };  // first, count: queries
  const Segment* segments;
  const int32_t* block_tables;
  std::vector<int64_t> slots;  // per row: block * BLOCK + offset
  std::vector<Task> tasks;

  AttentionPlan(const Segment* segments, int64_t count, const int32_t* block_tables, const Shape& shape)
      : segments(segments), block_tables(block_tables) {
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t s = 0; s < count; ++s) {
      const Segment& segment = segments[s];
      for (int64_t token = segment.past; token < segment.past + segment.count; ++token)
        slots.push_back(block_tables[segment.table + token / BLOCK] * int64_t{BLOCK} + token % BLOCK);
      const int64_t pairs = segment.count * group;
      const int64_t tiles = (pairs + ROWS - 1) / ROWS, rows = tiles ? (pairs + tiles - 1) / tiles : 0;
      for (int64_t h = 0; h < shape.kv_heads; ++h)
        for (int64_t r = 0; r < pairs; r += rows) tasks.push_back({s, h, r, std::min(rows, pairs - r)});
    }
  }

  int64_t rows() const { return static_cast<int64_t>(slots.size()); }
};

// Writes the keys and values of a row into their block.
void store_kv(const AttentionPlan& plan, int64_t row, const Heads& k, const Heads& v, const LayerKV& kv,
              const Shape& shape) {
  const int64_t block = plan.slots[row] / BLOCK, offset = plan.slots[row] % BLOCK;
  for (int64_t h = 0; h < shape.kv_heads; ++h) {
    const int64_t at = block * shape.kv_heads + h;
    const float *key = k.at(row, h), *value = v.at(row, h);
    float* keys = kv.keys + at * shape.key_size * BLOCK + offset;
    for (int64_t d = 0; d < shape.key_size; ++d) keys[d * BLOCK] = key[d];
    std::copy_n(value, shape.value_size, kv.values + (at * BLOCK + offset) * shape.value_stride);
  }
}

// Attention of every row of a batch over its sequence, once all keys and values are stored; out is
// [rows][heads * value_size]. All threads of a team call it, and share its work.
void attend_batch(TeamThread& thread, const AttentionPlan& plan, const Heads& q, const LayerKV& kv,
                  const Rows& out, const Shape& shape, const float* sinks) {
  std::vector<float> scratch(ROWS * (shape.key_size + shape.value_stride + BLOCK));
  thread.parallel_for(plan.tasks.size(), 1, [&](int64_t i, int64_t) {
    const AttentionPlan::Task& task = plan.tasks[i];
    const Segment& segment = plan.segments[task.segment];
    attend(q, kv, out, segment, plan.block_tables + segment.table, shape, sinks, task.kv_head, task.first,
           task.count, scratch.data());
  });
}

}  // namespace
