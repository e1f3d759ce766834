#include "backend/cuda/step_inputs.h"

#include <algorithm>
#include <cstring>

#include "backend/backend.h"
#include "base/error.h"
#include "kernels/ops/token_weights.h"

namespace sagelm::cuda {
namespace {

// Pages that a sequence has in its table.
int64_t num_pages(const SequenceChunk& sequence) {
  return (sequence.kv_len + (sequence.tail >= 0 ? 0 : kPageTokens - 1)) / kPageTokens;
}

constexpr size_t kDrawIntegers = sizeof(kernels::RowDraw) / sizeof(int32_t);

size_t list_integers(std::span<const TokenDraw> draws) {
  size_t count = 0;
  for (const TokenDraw& draw : draws) count += draw.penalized.size() + draw.banned.size();
  return count;
}

// Draws into rows and their lists into lists, which begins at integer lists_at.
void write_draws(std::span<const TokenDraw> draws, int32_t first_name, std::span<int32_t> rows,
                 std::span<int32_t> lists, size_t lists_at) {
  size_t used = 0;
  const auto put = [&](std::span<const int32_t> list, int32_t& at, int32_t& size) {
    at = static_cast<int32_t>(lists_at + used);
    size = static_cast<int32_t>(list.size());
    std::copy(list.begin(), list.end(), lists.subspan(used).begin());
    used += list.size();
  };
  for (size_t i = 0; i < draws.size(); ++i) {
    const TokenDraw& draw = draws[i];
    kernels::RowDraw row{};
    row.uniform = draw.uniform;
    row.top_p = draw.top_p;
    row.octaves = draw.temperature > 0 ? weights::octaves_of(draw.temperature) : 0.0F;
    row.penalty = draw.penalty;
    row.farthest = weights::distance_of(draw.min_p);
    row.top_k = draw.top_k;
    row.row = static_cast<int32_t>(draw.row);
    row.place = name_place(first_name) + static_cast<int32_t>(i);
    put(draw.penalized, row.history, row.history_size);
    put(draw.banned, row.banned, row.banned_size);
    std::memcpy(rows.subspan(i * kDrawIntegers).data(), &row, sizeof row);
  }
}

}  // namespace

StepInputs send_step_inputs(const Batch& batch, std::span<const TokenDraw> draws,
                            int32_t first_name, DeviceIntegers& buffer, cudaStream_t stream) {
  constexpr int64_t kMost = int64_t{1} << 30;
  StepInputs inputs;
  const auto count = static_cast<int64_t>(batch.sequences.size());
  int64_t rows = 0, max_q_len = 0, max_kv_len = 0, stride = 1;
  for (const SequenceChunk& sequence : batch.sequences) {
    const int64_t pages = num_pages(sequence);
    if (sequence.first_row != rows || sequence.q_len < 0 || sequence.q_start() < 0 ||
        pages > static_cast<int64_t>(sequence.pages.size()) || sequence.kv_len > kMost) {
      fail("the batch's sequences do not fit its rows");
    }
    rows += sequence.q_len;
    inputs.begins_in_first_page |= sequence.q_start() < kPageTokens;
    if (sequence.tail >= 0) {
      const int64_t before = sequence.q_start() / kPageTokens;
      const auto closed = static_cast<int32_t>(sequence.kv_len / kPageTokens - before);
      inputs.max_closed_pages = std::max(inputs.max_closed_pages, closed);
      inputs.closes_first_page |= before == 0 && closed > 0;
    }
    max_q_len = std::max(max_q_len, sequence.q_len);
    max_kv_len = std::max(max_kv_len, sequence.kv_len);
    stride = std::max(stride, pages);
  }
  if (max_q_len == 1) {
    max_kv_len = decode_length(max_kv_len);
    stride = std::max(stride, max_kv_len / kPageTokens);
    inputs.begins_in_first_page = true;
  }
  if (rows != batch.rows() || rows > kMost || count * stride > kMost) {
    fail("the batch's sequences do not fit its rows");
  }
  inputs.rows = static_cast<int32_t>(rows);
  inputs.num_sequences = static_cast<int32_t>(count);
  inputs.max_q_len = static_cast<int32_t>(max_q_len);
  inputs.max_kv_len = static_cast<int32_t>(max_kv_len);
  inputs.page_table_stride = static_cast<int32_t>(stride);

  if (draws.size() > kMostDraws) fail("a step draws {} tokens at most", kMostDraws);
  // Draws come first and their lists, whose lengths change from step to step, last: all else stays
  // where it is.
  const auto num_draws = static_cast<int64_t>(draws.size());
  const std::span<int32_t> host = buffer.prepare(
      draws.size() * kDrawIntegers + step_integers(rows, count, stride) + list_integers(draws));
  size_t used = 0;
  const auto take = [&](int64_t size) {
    const std::span<int32_t> part = host.subspan(used, static_cast<size_t>(size));
    used += part.size();
    return part;
  };
  const std::span<int32_t> draw_rows = take(num_draws * int64_t{kDrawIntegers});
  const std::span<int32_t> tokens = take(rows), positions = take(rows), slots = take(rows),
                           cu_q_lens = take(count + 1), kv_lens = take(count), tails = take(count),
                           page_table = take(count * stride);
  std::copy(batch.tokens.begin(), batch.tokens.end(), tokens.begin());
  std::fill(page_table.begin(), page_table.end(), 0);
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const SequenceChunk& sequence = batch.sequences[i];
    const auto pages = static_cast<size_t>(num_pages(sequence));
    const bool quantized = sequence.tail >= 0;
    const bool fills_page = sequence.kv_len / kPageTokens > sequence.q_start() / kPageTokens;
    tails[i] = sequence.tail;
    cu_q_lens[i] = static_cast<int32_t>(sequence.first_row);
    kv_lens[i] = static_cast<int32_t>(sequence.kv_len);
    std::copy_n(sequence.pages.begin(), pages,
                page_table.begin() + static_cast<int64_t>(i) * stride);
    for (int64_t j = 0; j < sequence.q_len; ++j) {
      const auto row = static_cast<size_t>(sequence.first_row + j);
      const int64_t position = sequence.q_start() + j;
      const int64_t page =
          quantized ? sequence.tail : sequence.pages[static_cast<size_t>(position / kPageTokens)];
      positions[row] = static_cast<int32_t>(position);
      slots[row] = quantized && fills_page
                       ? -1
                       : static_cast<int32_t>(page * kPageTokens + position % kPageTokens);
    }
  }
  cu_q_lens.back() = static_cast<int32_t>(rows);
  write_draws(draws, first_name, draw_rows, host.subspan(used), used);

  const int32_t* device = buffer.send(stream);
  const auto on_device = [&](std::span<int32_t> part) {
    return device + (part.data() - host.data());
  };
  inputs.tokens = on_device(tokens);
  inputs.positions = on_device(positions);
  inputs.slots = on_device(slots);
  inputs.cu_q_lens = on_device(cu_q_lens);
  inputs.kv_lens = on_device(kv_lens);
  inputs.tails = on_device(tails);
  inputs.page_table = on_device(page_table);
  inputs.num_draws = static_cast<int32_t>(num_draws);
  inputs.draws = reinterpret_cast<const kernels::RowDraw*>(device);
  inputs.integers = device;
  return inputs;
}

StepInputs sequences_of(const StepInputs& step, int32_t first, int32_t count) {
  StepInputs part = step;
  part.num_sequences = count;
  part.cu_q_lens += first;
  part.kv_lens += first;
  part.tails += first;
  part.page_table += int64_t{first} * step.page_table_stride;
  return part;
}

size_t step_integers(int64_t rows, int64_t sequences, int64_t page_table_stride) {
  return static_cast<size_t>(3 * rows + 3 * sequences + 1 + sequences * page_table_stride);
}

size_t usual_draw_integers() {
  constexpr size_t kLists = 80;  // what the repeat penalty looks back on by default, and a few ends
  return kMostDraws * (kDrawIntegers + kLists);
}

}  // namespace sagelm::cuda
