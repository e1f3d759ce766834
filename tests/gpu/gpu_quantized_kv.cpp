#include "gpu/gpu_quantized_kv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

#include "base/fp8.h"
#include "kernels/attention/recipe.h"
#include "kernels/ops/rope_append.h"
#include "sagelm/attention.h"

namespace sagelm::testing {
namespace {

constexpr int kPage = kernels::kTileTokens;
constexpr int kPoison = 0x5A;

GpuArray make_rotations(int32_t half, int positions) {
  std::vector<float> frequencies;
  for (int32_t i = 0; i < half; ++i) {
    frequencies.push_back(static_cast<float>(std::pow(10000.0, -double(i) / half)));
  }
  const GpuArray inverse(kernels::Element::kF32, frequencies);
  GpuArray rotations(kernels::Element::kF32, static_cast<size_t>(positions) * 2 * half);
  expect_done(kernels::fill_rotations(static_cast<const float*>(inverse.data()), half, positions,
                                      static_cast<float*>(rotations.data()), nullptr),
              "fill_rotations");
  return rotations;
}

template <typename T>
std::vector<T> read(const DeviceBuffer& buffer) {
  std::vector<T> values(buffer.bytes() / sizeof(T));
  buffer.download(values.data(), buffer.bytes());
  return values;
}

double from_bits(kernels::Element type, uint16_t bits) {
  return type == kernels::Element::kF16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// Softmax of natural logits, and the sums with the values of value(key, channel).
template <typename Value>
GpuQuantizedKv::Row attend(std::vector<double> logits, int dim, const Value& value) {
  GpuQuantizedKv::Row row;
  row.out.resize(static_cast<size_t>(dim));
  row.magnitudes.resize(row.out.size());
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double& logit : logits) sum += logit = std::exp(logit - top);
  for (size_t key = 0; key < logits.size(); ++key) {
    for (int c = 0; c < dim; ++c) {
      const double term = logits[key] / sum * value(static_cast<int>(key), c);
      row.out[static_cast<size_t>(c)] += term;
      row.magnitudes[static_cast<size_t>(c)] += std::abs(term);
    }
  }
  row.lse = top + std::log(sum);
  return row;
}

std::vector<float> rotated(std::vector<float> x, std::vector<size_t> strides, float factor) {
  for (const size_t stride : strides) {
    if (stride >= x.size()) continue;
    for (size_t i = 0; i < x.size(); ++i) {
      if ((i & stride) != 0) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
  for (float& value : x) value *= factor;
  return x;
}

void plant_fact(const KvShape& shape, int last, int fact, std::vector<float>& rows) {
  const auto dim = static_cast<size_t>(shape.dim), half = dim / 2;
  const float* query = rows.data() + static_cast<size_t>(last) * shape.width();
  float* key = rows.data() + static_cast<size_t>(fact) * shape.width() +
               static_cast<size_t>(shape.heads) * dim;
  float* value = key + static_cast<size_t>(shape.kv_heads) * dim;
  double square = 0;
  for (size_t c = 0; c < dim; ++c) square += double(query[c]) * double(query[c]);
  const double gain = 13.0 * std::sqrt(double(dim)) / square;
  for (size_t i = 0; i < half; ++i) {
    // Rotated as far as its position, this is the query as far as its own.
    const double angle = (last - fact) * std::pow(10000.0, -double(i) / double(half));
    const double a = query[i], b = query[i + half];
    key[i] = static_cast<float>(gain * (a * std::cos(angle) - b * std::sin(angle)));
    key[i + half] = static_cast<float>(gain * (b * std::cos(angle) + a * std::sin(angle)));
  }
  for (size_t c = 0; c < dim; ++c) value[c] = c % 2 == 0 ? 2.0f : -2.0f;
}

}  // namespace

std::vector<float> rotated_key(std::vector<float> x) {
  return rotated(std::move(x), {1, 2, 4, 8, 16, 32, 64}, 0.125f);
}
std::vector<float> rotated_query(std::vector<float> x) {
  const float factor = x.size() == 64 ? 0.125f : 0.0625f;
  return rotated(std::move(x), {1, 2, 4, 32, 64, 8, 16}, factor);
}

GpuQuantizedKv::GpuQuantizedKv(const KvShape& shape, const std::vector<int>& lengths, bool smooth_k,
                               int fact)
    : shape_(shape),
      smooth_k_(smooth_k),
      sequences_(static_cast<int>(lengths.size())),
      lengths_(lengths.size()),
      cu_q_lens_(lengths.size() + 1),
      rotations_(
          make_rotations(shape.dim / 2, *std::max_element(lengths.begin(), lengths.end()) + 1)),
      qkv_(shape.type, size_t{1}) {
  const auto width = shape.width();
  for (size_t i = 0; i < lengths.size(); ++i) {
    // Keys have offsets, as those of models do.
    std::vector<float> rows =
        normal_values(static_cast<size_t>(lengths[i]) * width, 1.0f, static_cast<uint32_t>(7 + i));
    for (size_t at = 0; at < rows.size(); ++at) {
      const size_t column = at % width, dim = static_cast<size_t>(shape.dim);
      const size_t head = column / dim;
      const bool is_key = head >= static_cast<size_t>(shape.heads) &&
                          head < static_cast<size_t>(shape.heads + shape.kv_heads);
      if (is_key && column % dim % 8 == 7) rows[at] += column % 16 == 7 ? 4.0f : -3.0f;
    }
    if (i == 0 && fact >= 0) plant_fact(shape, lengths[0] - 1, fact, rows);
    // The keys as an FP16 cache has them.
    const GpuArray qkv(shape.type, rows);
    std::vector<int32_t> positions(static_cast<size_t>(lengths[i]));
    std::iota(positions.begin(), positions.end(), 0);
    const DeviceBuffer on_device = upload_integers(positions);
    const size_t cache_size = positions.size() * static_cast<size_t>(shape.kv_heads * shape.dim);
    const GpuArray keys(shape.type, cache_size), values(shape.type, cache_size);
    kernels::RopeAppend args;
    args.type = shape.type;
    args.qkv = qkv.data();
    args.rows = lengths[i];
    args.num_heads = shape.heads;
    args.num_kv_heads = shape.kv_heads;
    args.head_dim = shape.dim;
    args.positions = args.slots = static_cast<const int32_t*>(on_device.data());
    args.rotations = static_cast<const float*>(rotations_.data());
    args.keys = keys.data();
    args.values = values.data();
    expect_done(kernels::rope_append(args, nullptr), "rope_append");
    rotated_.push_back(qkv.download());
    rows_.push_back(std::move(rows));
  }

  int pages = 0, longest = 0;
  for (const int length : lengths) {
    pages += length / kPage;
    longest = std::max(longest, length / kPage);
  }
  // Page 0, tail 0 and mean 0 belong to nobody; the others are taken in no order.
  pages_ = pages + 1;
  stride_ = longest + 2;
  std::vector<int32_t> ids(static_cast<size_t>(pages)), slots(lengths.size());
  std::iota(ids.begin(), ids.end(), 1);
  std::iota(slots.begin(), slots.end(), 1);
  std::mt19937 random(3);
  std::shuffle(ids.begin(), ids.end(), random);
  std::shuffle(slots.begin(), slots.end(), random);
  tails_ = slots;
  std::shuffle(slots.begin(), slots.end(), random);
  means_ = slots;
  page_table_.assign(lengths.size() * static_cast<size_t>(stride_), 0);
  for (size_t i = 0; i < lengths.size(); ++i) {
    for (int page = 0; page < lengths[i] / kPage; ++page) {
      page_table_[i * static_cast<size_t>(stride_) + static_cast<size_t>(page)] = ids.back();
      ids.pop_back();
    }
  }
  const auto heads = static_cast<size_t>(shape.kv_heads);
  const size_t tiles = static_cast<size_t>(pages_) * heads;
  const size_t room = lengths.size() + 1;
  keys_ = DeviceBuffer(tiles * static_cast<size_t>(shape.key_bytes()));
  values_ = DeviceBuffer(tiles * static_cast<size_t>(shape.value_bytes()));
  scales_ = DeviceBuffer(tiles * static_cast<size_t>(shape.scales()) * sizeof(float));
  mean_memory_ = DeviceBuffer(room * heads * static_cast<size_t>(shape.dim) * sizeof(float));
  tail_memory_ = DeviceBuffer(room * 2 * heads * static_cast<size_t>(kPage * shape.dim) * 2);
  arrivals_ = DeviceBuffer(static_cast<size_t>(sequences_) * heads * sizeof(uint32_t));
  arrivals_.fill(0);
  for (DeviceBuffer* buffer : {&keys_, &values_, &scales_, &mean_memory_, &tail_memory_}) {
    buffer->fill(kPoison);
  }
}

void GpuQuantizedKv::prepare(const std::vector<int>& counts) {
  const auto width = static_cast<int64_t>(shape_.width());
  std::vector<float> rows;
  std::vector<int32_t> positions, slots, lens;
  step_ = {};
  for (size_t i = 0; i < counts.size(); ++i) {
    const int start = lengths_[i], end = start + counts[i];
    const int closed = end / kPage - start / kPage;
    rows.insert(rows.end(), rows_[i].begin() + start * width, rows_[i].begin() + end * width);
    for (int position = start; position < end; ++position) {
      positions.push_back(position);
      slots.push_back(closed > 0 ? -1 : tails_[i] * kPage + position % kPage);
    }
    cu_q_lens_[i + 1] = static_cast<int32_t>(positions.size());
    lens.push_back(end);
    lengths_[i] = end;
    step_.max_q_len = std::max(step_.max_q_len, counts[i]);
    step_.max_kv_len = std::max(step_.max_kv_len, end);
    step_.max_closed_pages = std::max(step_.max_closed_pages, closed);
    step_.closes_first_page |= closed > 0 && start < kPage;
    step_.begins_in_first_page |= start < kPage;
  }
  const auto send = [](DeviceBuffer& buffer, const std::vector<int32_t>& values) {
    buffer = upload_integers(values);
    return static_cast<const int32_t*>(buffer.data());
  };
  step_.rows = static_cast<int32_t>(positions.size());
  step_.num_sequences = sequences_;
  step_.positions = send(positions_device_, positions);
  step_.slots = send(slots_device_, slots);
  step_.cu_q_lens = send(cu_device_, cu_q_lens_);
  step_.kv_lens = send(lens_device_, lens);
  step_.page_table = send(table_device_, page_table_);
  step_.page_table_stride = stride_;
  step_.tails = send(tails_device_, tails_);
  step_.means = send(means_device_, means_);
  qkv_ = GpuArray(shape_.type, std::move(rows));
}

void GpuQuantizedKv::append(const std::vector<int>& counts) { run(append_args(counts)); }

void GpuQuantizedKv::append_for_prefill(const std::vector<int>& counts) {
  kernels::AppendToQuantizedKv args = append_args(counts);
  args.softmax_scale = decode_args().softmax_scale;
  prefill_workspace_ = DeviceBuffer(
      kernels::quantized_kv_prefill_workspace_bytes(args.cache, args.step, sequences_));
  prefill_workspace_.fill(0xFF);
  args.prefill = prefill_workspace_.data();
  run(args);
}

kernels::AppendToQuantizedKv GpuQuantizedKv::append_args(const std::vector<int>& counts) {
  prepare(counts);
  kernels::AppendToQuantizedKv args;
  args.cache = decode_args().cache;
  args.step = step_;
  args.qkv = qkv_.data();
  args.rotations = static_cast<const float*>(rotations_.data());
  args.smooth_k = smooth_k_;
  args.arrivals = static_cast<uint32_t*>(arrivals_.data());
  return args;
}

void GpuQuantizedKv::run(const kernels::AppendToQuantizedKv& args) {
  expect_done(kernels::append_to_quantized_kv(args, nullptr), "append_to_quantized_kv");
  download();
  check_arrivals();
}

void GpuQuantizedKv::check_arrivals() const {
  for (const uint32_t count : read<uint32_t>(arrivals_)) {
    if (count != 0) throw std::runtime_error("the kernel left its counters behind");
  }
}

GpuQuantizedKv::Output GpuQuantizedKv::prefill(int at_once) {
  const auto columns = static_cast<size_t>(shape_.heads * shape_.dim);
  const GpuArray out(shape_.type, static_cast<size_t>(step_.rows) * columns);
  const kernels::PrefillFromQuantizedKv args = {.cache = decode_args().cache,
                                                .step = step_,
                                                .out = out.data(),
                                                .out_stride = static_cast<int64_t>(columns)};
  const size_t bytes =
      kernels::quantized_kv_prefill_workspace_bytes(args.cache, args.step, at_once);
  expect_done(kernels::prefill_from_quantized_kv(args, prefill_workspace_.data(), bytes, nullptr),
              "prefill_from_quantized_kv");
  return {out.download(), out.raw(), {}};
}

void GpuQuantizedKv::download() {
  host_keys_ = read<uint8_t>(keys_);
  host_values_ = read<uint8_t>(values_);
  host_scales_ = read<float>(scales_);
  host_means_ = read<float>(mean_memory_);
  host_tails_ = read<uint16_t>(tail_memory_);
}

kernels::DecodeFromQuantizedKv GpuQuantizedKv::decode_args() const {
  kernels::DecodeFromQuantizedKv args;
  args.cache = {.type = shape_.type,
                .num_heads = shape_.heads,
                .num_kv_heads = shape_.kv_heads,
                .head_dim = shape_.dim,
                .int4_keys = shape_.int4_keys,
                .keys = static_cast<int8_t*>(keys_.data()),
                .values = static_cast<uint8_t*>(values_.data()),
                .scales = static_cast<float*>(scales_.data()),
                .means = static_cast<float*>(mean_memory_.data()),
                .tails = tail_memory_.data()};
  args.step = step_;
  args.queries = qkv_.data();
  args.query_stride = static_cast<int64_t>(shape_.width());
  args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape_.dim));
  return args;
}

GpuQuantizedKv::Output GpuQuantizedKv::decode() const {
  kernels::DecodeFromQuantizedKv args = decode_args();
  const auto columns = static_cast<size_t>(shape_.heads * shape_.dim);
  const GpuArray out(shape_.type, static_cast<size_t>(step_.rows) * columns);
  const size_t rows = static_cast<size_t>(sequences_ * shape_.heads * step_.max_q_len);
  DeviceBuffer lse(rows * sizeof(float));
  lse.fill(kPoison);
  args.out = out.data();
  args.out_stride = static_cast<int64_t>(columns);
  args.lse = static_cast<float*>(lse.data());
  DeviceBuffer workspace(kernels::quantized_kv_decode_workspace_bytes(args));
  if (workspace.bytes() > 0) workspace.fill(0xFF);
  expect_done(kernels::decode_from_quantized_kv(args, workspace.data(), nullptr),
              "decode_from_quantized_kv");
  return {out.download(), out.raw(), read<float>(lse)};
}

GpuQuantizedKv::Output GpuQuantizedKv::append_and_decode(const std::vector<int>& counts) {
  prepare(counts);
  kernels::DecodeFromQuantizedKv args = decode_args();
  const auto columns = static_cast<size_t>(shape_.heads * shape_.dim);
  const GpuArray out(shape_.type, static_cast<size_t>(step_.rows) * columns);
  args.out = out.data();
  args.out_stride = static_cast<int64_t>(columns);
  args.rotations = static_cast<const float*>(rotations_.data());
  args.arrivals = static_cast<uint32_t*>(arrivals_.data());
  DeviceBuffer workspace(kernels::quantized_kv_decode_workspace_bytes(args));
  if (workspace.bytes() > 0) workspace.fill(0xFF);
  expect_done(kernels::decode_from_quantized_kv(args, workspace.data(), nullptr),
              "decode_from_quantized_kv");
  check_arrivals();
  download();
  return {out.download(), out.raw(), {}};
}

size_t GpuQuantizedKv::place(int sequence, int index, int kv_head) const {
  const int32_t id = page_table_[static_cast<size_t>(sequence * stride_ + index)];
  return static_cast<size_t>(id * shape_.kv_heads + kv_head);
}

std::vector<uint8_t> GpuQuantizedKv::raw_keys(int sequence, int index, int kv_head) const {
  const int64_t bytes = shape_.key_bytes();
  const auto from =
      host_keys_.begin() + static_cast<int64_t>(place(sequence, index, kv_head)) * bytes;
  return {from, from + bytes};
}

std::vector<uint8_t> GpuQuantizedKv::raw_values(int sequence, int index, int kv_head) const {
  const int64_t bytes = shape_.value_bytes();
  const auto from =
      host_values_.begin() + static_cast<int64_t>(place(sequence, index, kv_head)) * bytes;
  return {from, from + bytes};
}

GpuQuantizedKv::Page GpuQuantizedKv::page(int sequence, int index, int kv_head) const {
  Page page;
  const int dim = shape_.padded();
  const std::vector<uint8_t> keys = raw_keys(sequence, index, kv_head);
  const std::vector<uint8_t> values = raw_values(sequence, index, kv_head);
  for (int token = 0; token < kPage; ++token) {
    const int row = kernels::row_of_key(token);
    for (int c = 0; c < dim; ++c) {
      if (shape_.int4_keys) {
        // 16 bytes are 32 channels; 64 or 32 bytes a row.
        const int chunk = dim == 128 ? c / 32 ^ (row >> 1 & 3) : c / 32 ^ (row >> 2 & 1);
        const uint8_t byte =
            keys[static_cast<size_t>(row * dim / 2 + chunk * 16 + c / 8 % 4 * 4 + c % 4)];
        page.keys.push_back(
            static_cast<int8_t>((c % 8 < 4 ? byte << 4 : byte) & 0xF0));  // 16 times
        page.keys.back() /= 16;
      } else {
        const int chunk = dim == 64 ? kernels::swizzled_chunk<64>(row, c / 16)
                                    : kernels::swizzled_chunk<128>(row, c / 16);
        page.keys.push_back(
            static_cast<int8_t>(keys[static_cast<size_t>(row * dim + chunk * 16 + c % 16)]));
      }
      const int token_chunk = kernels::swizzled_chunk<128>(c, token / 16);
      page.values.push_back(values[static_cast<size_t>(c * kPage + token_chunk * 16 + token % 16)]);
    }
  }
  const float* scales =
      host_scales_.data() + place(sequence, index, kv_head) * static_cast<size_t>(shape_.scales());
  page.scales.assign(scales, scales + kernels::kValueScaleInverse + 1);
  for (int key = 0; shape_.int4_keys && key < kPage; ++key) {
    uint32_t word;
    std::memcpy(&word, scales + kernels::kTileScales + key, sizeof word);
    page.steps.push_back(bfloat16_to_float(static_cast<uint16_t>(word)));
    page.middles.push_back(bfloat16_to_float(static_cast<uint16_t>(word >> 16)));
  }
  return page;
}

std::vector<float> GpuQuantizedKv::mean(int sequence, int kv_head) const {
  const int32_t id = means_[static_cast<size_t>(sequence)];
  const auto from = host_means_.begin() + (id * shape_.kv_heads + kv_head) * shape_.dim;
  return {from, from + shape_.dim};
}

double GpuQuantizedKv::token(int sequence, int position, int which, int kv_head,
                             int channel) const {
  const int head = shape_.heads + which * shape_.kv_heads + kv_head;
  return rotated_[static_cast<size_t>(sequence)][static_cast<size_t>(position) * shape_.width() +
                                                 static_cast<size_t>(head * shape_.dim + channel)];
}

double GpuQuantizedKv::tail(int sequence, int place, int which, int kv_head, int channel) const {
  const int64_t head =
      (int64_t{tails_[static_cast<size_t>(sequence)]} * 2 + which) * shape_.kv_heads + kv_head;
  return from_bits(shape_.type,
                   host_tails_[static_cast<size_t>((head * kPage + place) * shape_.dim + channel)]);
}

GpuQuantizedKv::Row GpuQuantizedKv::oracle(int sequence, int query_index, int head) const {
  const int dim = shape_.dim, kv_head = head / (shape_.heads / shape_.kv_heads);
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  std::vector<double> q;
  for (int c = 0; c < dim; ++c) q.push_back(query(sequence, query_index, head, c));
  std::vector<float> quantized(q.begin(), q.end());
  if (shape_.int4_keys) {
    quantized.resize(static_cast<size_t>(shape_.padded()));
    quantized = rotated_query(std::move(quantized));
  }
  float amax = recipe::kAmaxFloor;
  for (const float x : quantized) amax = std::max(amax, std::abs(x));
  std::vector<double> integers;
  const float inverse = recipe::kInt8Max / amax;
  for (const float x : quantized) integers.push_back(std::nearbyint(double(x) * double(inverse)));
  const int length = lengths_[static_cast<size_t>(sequence)];
  const int full = length / kPage;
  double mean_product = 0;
  if (full > 0) {
    const std::vector<float> mean = this->mean(sequence, kv_head);
    for (int c = 0; c < dim; ++c) {
      mean_product += q[static_cast<size_t>(c)] * static_cast<double>(mean[static_cast<size_t>(c)]);
    }
  }
  std::vector<Page> pages;
  for (int i = 0; i < full; ++i) pages.push_back(page(sequence, i, kv_head));
  const int seen = length - last_count(sequence) + query_index + 1;
  std::vector<double> logits;
  for (int key = 0; key < seen; ++key) {
    double product = 0;
    if (key < full * kPage) {
      const Page& page = pages[static_cast<size_t>(key / kPage)];
      const auto from = static_cast<size_t>(key % kPage * shape_.padded());
      double sum = 0;
      for (size_t c = 0; c < integers.size(); ++c) {
        product += integers[c] * page.keys[from + c];
        sum += integers[c];
      }
      if (shape_.int4_keys) {
        const auto at = static_cast<size_t>(key % kPage);
        product = product * static_cast<double>(page.steps[at]) +
                  sum * static_cast<double>(page.middles[at]);
      } else {
        product *= static_cast<double>(page.scales[static_cast<size_t>(key / 4 % 4)]);
      }
      product *= static_cast<double>(amax) / 127.0;
    } else {
      for (int c = 0; c < dim; ++c) {
        product += q[static_cast<size_t>(c)] * tail(sequence, key - full * kPage, 0, kv_head, c);
      }
      product -= mean_product;
    }
    logits.push_back(product * scale);
  }
  Row row = attend(std::move(logits), dim, [&](int key, int c) {
    if (key >= full * kPage) return tail(sequence, key - full * kPage, 1, kv_head, c);
    const Page& page = pages[static_cast<size_t>(key / kPage)];
    const uint8_t code = page.values[static_cast<size_t>(key % kPage * shape_.padded() + c)];
    return static_cast<double>(e4m3_to_float(code)) * static_cast<double>(page.scales[4]);
  });
  row.lse += mean_product * scale;
  return row;
}

GpuQuantizedKv::Row GpuQuantizedKv::exact(int sequence, int query_index, int head) const {
  const int dim = shape_.dim, kv_head = head / (shape_.heads / shape_.kv_heads);
  const int seen = length(sequence) - last_count(sequence) + query_index + 1;
  std::vector<double> logits;
  for (int key = 0; key < seen; ++key) {
    double product = 0;
    for (int c = 0; c < dim; ++c) {
      product += query(sequence, query_index, head, c) * token(sequence, key, 0, kv_head, c);
    }
    logits.push_back(product / std::sqrt(static_cast<double>(dim)));
  }
  return attend(std::move(logits), dim,
                [&](int key, int c) { return token(sequence, key, 1, kv_head, c); });
}

std::vector<double> GpuQuantizedKv::with_fp16_cache() const {
  const int tokens = length(0), dim = shape_.dim;
  std::vector<float> query, keys, values;
  for (int c = 0; c < dim; ++c) {
    query.push_back(static_cast<float>(this->query(0, last_count(0) - 1, 0, c)));
  }
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < dim; ++c) {
      keys.push_back(static_cast<float>(token(0, t, 0, 0, c)));
      values.push_back(static_cast<float>(token(0, t, 1, 0, c)));
    }
  }
  const GpuArray q(kernels::Element::kF16, query), k(kernels::Element::kF16, keys),
      v(kernels::Element::kF16, values), out(kernels::Element::kF16, query.size());
  sagelm_attention_args args = {};
  args.struct_size = sizeof args;
  args.batch = args.num_heads = args.num_kv_heads = args.max_q_len = 1;
  args.head_dim = dim;
  args.max_kv_len = tokens;
  args.causal = 1;
  args.q = {q.data(), dim, dim, dim};
  args.out = {out.data(), dim, dim, dim};
  args.k = {k.data(), int64_t{tokens} * dim, dim, dim};
  args.v = {v.data(), int64_t{tokens} * dim, dim, dim};
  size_t bytes = 0;
  if (sagelm_attention_workspace_bytes(&args, &bytes) != SAGELM_ATTENTION_OK) {
    throw std::runtime_error(sagelm_attention_last_error());
  }
  const DeviceBuffer workspace(bytes);
  args.workspace = workspace.data();
  args.workspace_bytes = bytes;
  if (sagelm_attention(&args) != SAGELM_ATTENTION_OK) {
    throw std::runtime_error(sagelm_attention_last_error());
  }
  return out.download();
}

void GpuQuantizedKv::check_untouched() const {
  std::vector<bool> written(static_cast<size_t>(pages_), false);
  for (int i = 0; i < sequences_; ++i) {
    for (int page = 0; page < length(i) / kPage; ++page) {
      written[static_cast<size_t>(page_table_[static_cast<size_t>(i * stride_ + page)])] = true;
    }
  }
  const auto poisoned = [](const void* from, size_t bytes) {
    const auto* begin = static_cast<const uint8_t*>(from);
    return std::all_of(begin, begin + bytes, [](uint8_t byte) { return byte == kPoison; });
  };
  const auto key_bytes = static_cast<size_t>(shape_.kv_heads * shape_.key_bytes());
  const auto value_bytes = static_cast<size_t>(shape_.kv_heads * shape_.value_bytes());
  const auto page_scales = static_cast<size_t>(shape_.kv_heads * shape_.scales());
  for (size_t page = 0; page < written.size(); ++page) {
    if (written[page]) continue;
    if (!poisoned(host_keys_.data() + page * key_bytes, key_bytes) ||
        !poisoned(host_values_.data() + page * value_bytes, value_bytes) ||
        !poisoned(host_scales_.data() + page * page_scales, page_scales * sizeof(float))) {
      throw std::runtime_error("a page that nobody filled was written");
    }
  }
  // Those that belong to nobody come first.
  const auto channels = static_cast<size_t>(shape_.kv_heads * shape_.dim);
  if (!poisoned(host_means_.data(), channels * sizeof(float)) ||
      !poisoned(host_tails_.data(), 2 * channels * kPage * sizeof(uint16_t))) {
    throw std::runtime_error("a tail or mean of no sequence was written");
  }
}

}  // namespace sagelm::testing
