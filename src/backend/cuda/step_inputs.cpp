#include "backend/cuda/step_inputs.h"

#include <algorithm>

#include "backend/backend.h"
#include "base/error.h"

namespace sagelm::cuda {
namespace {

// Pages that a sequence has in its table.
int64_t num_pages(const SequenceChunk& sequence) {
  return (sequence.kv_len + (sequence.tail >= 0 ? 0 : kPageTokens - 1)) / kPageTokens;
}

}  // namespace

StepInputs send_step_inputs(const Batch& batch, DeviceIntegers& buffer, cudaStream_t stream) {
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

  const std::span<int32_t> host = buffer.prepare(step_integers(rows, count, stride));
  size_t used = 0;
  const auto take = [&](int64_t size) {
    const std::span<int32_t> part = host.subspan(used, static_cast<size_t>(size));
    used += part.size();
    return part;
  };
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

}  // namespace sagelm::cuda
