// What kernels need to know of a batch, on the GPU: sent once per step.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "backend/batch.h"
#include "backend/cuda/memory.h"
#include "backend/token_draw.h"
#include "kernels/ops/draw.h"

namespace sagelm::cuda {

struct StepInputs {
  int32_t rows = 0;
  int32_t num_sequences = 0;
  int32_t max_q_len = 0;
  int32_t max_kv_len = 0;  // or, where every sequence has one row, some multiple above it
  int32_t page_table_stride = 0;
  // Of a quantized cache: the most pages that a sequence fills in this step, and whether one of
  // them is its sequence's first.
  int32_t max_closed_pages = 0;
  bool closes_first_page = false;
  bool begins_in_first_page = false;  // whether a sequence may be without a full page before it
  // Device arrays.
  const int32_t* tokens = nullptr;      // [rows]
  const int32_t* positions = nullptr;   // [rows], in the row's sequence
  const int32_t* slots = nullptr;       // [rows], page * kPageTokens + place in the page; with a
                                        // quantized cache as kernels::QuantizedKvStep has them
  const int32_t* cu_q_lens = nullptr;   // [num_sequences + 1], first row of each sequence
  const int32_t* kv_lens = nullptr;     // [num_sequences]
  const int32_t* tails = nullptr;       // [num_sequences], of a quantized cache
  const int32_t* page_table = nullptr;  // [num_sequences, page_table_stride]
  // What is drawn in it, and the integers that this refers to.
  int32_t num_draws = 0;
  const kernels::RowDraw* draws = nullptr;
  const int32_t* integers = nullptr;
};

// buffer holds the arrays. The first draw's token is called first_name. Throws Error if the batch's
// rows are not those of its sequences in order.
StepInputs send_step_inputs(const Batch& batch, std::span<const TokenDraw> draws,
                            int32_t first_name, DeviceIntegers& buffer, cudaStream_t stream);

// Sequences first .. first + count of the step alone. Their rows keep their numbers.
StepInputs sequences_of(const StepInputs& step, int32_t first, int32_t count);

// Integers that a step of so many tokens and sequences takes without draws, and those that draws
// take with lists of the usual lengths.
size_t step_integers(int64_t rows, int64_t sequences, int64_t page_table_stride);
size_t usual_draw_integers();

// The longest sequence as kernels are told of it: steps of a while of decoding are the same work in
// the same memory, whatever their sequences' lengths (see GraphCache).
constexpr int64_t decode_length(int64_t kv_len) { return (kv_len + 1023) / 1024 * 1024; }

}  // namespace sagelm::cuda
