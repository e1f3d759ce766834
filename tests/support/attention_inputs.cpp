#include "support/attention_inputs.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <span>

#include "base/dtype.h"

namespace sagelm::testing {
namespace {

constexpr uint16_t kHalfNaN = 0x7E00;

struct Channel {
  float scale = 1;
  float offset = 0;
};

std::vector<Channel> channels_of(int64_t head_dim, Inputs inputs, float offset, float spread,
                                 std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<Channel> channels(static_cast<size_t>(head_dim));
  for (size_t c = 0; c < channels.size(); ++c) {
    if (inputs != Inputs::kNormal && c % 16 == 5) {
      channels[c].offset = c % 32 == 5 ? offset : -offset;
    }
    if (inputs == Inputs::kHeavyTailed) channels[c].scale = std::exp(spread * normal(random));
  }
  return channels;
}

float draw(const Channel& channel, std::mt19937& random, std::normal_distribution<float>& normal) {
  return channel.scale * normal(random) + channel.offset;
}

}  // namespace

const char* inputs_name(Inputs inputs) {
  switch (inputs) {
    case Inputs::kNormal:
      return "normal";
    case Inputs::kOffsetK:
      return "offset-k";
    case Inputs::kHeavyTailed:
      return "heavy-tailed";
  }
  return "?";
}

AttentionProblem make_problem(const AttentionShape& shape, Inputs inputs, uint32_t seed) {
  AttentionProblem problem;
  problem.shape = shape;
  problem.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto q_channels = channels_of(shape.head_dim, inputs, 2.0f, 0.4f, random);
  const auto k_channels = channels_of(shape.head_dim, inputs, 8.0f, 0.4f, random);
  const auto v_channels = channels_of(shape.head_dim, inputs, 0.5f, 1.0f, random);
  for (int64_t i = 0; i < shape.q_len * shape.num_heads; ++i) {
    for (const Channel& channel : q_channels) {
      problem.q.push_back(half_to_float(float_to_half(draw(channel, random, normal))));
    }
  }
  for (int64_t i = 0; i < shape.kv_len * shape.num_kv_heads; ++i) {
    for (const Channel& channel : k_channels) {
      problem.k.push_back(float_to_half(draw(channel, random, normal)));
    }
    for (const Channel& channel : v_channels) {
      problem.v.push_back(float_to_half(draw(channel, random, normal)));
    }
  }
  return problem;
}

AttentionProblem prefix_of(const AttentionProblem& problem, int64_t kv_len, int64_t q_len) {
  AttentionProblem part;
  part.shape = problem.shape;
  part.shape.kv_len = kv_len;
  part.shape.q_len = q_len;
  part.softmax_scale = problem.softmax_scale;
  const int64_t width = problem.shape.num_heads * problem.shape.head_dim;
  part.q.assign(problem.q.begin() + (kv_len - q_len) * width, problem.q.begin() + kv_len * width);
  for (int64_t h = 0; h < problem.shape.num_kv_heads; ++h) {
    const int64_t begin = h * problem.shape.kv_len * problem.shape.head_dim;
    const int64_t end = begin + kv_len * problem.shape.head_dim;
    part.k.insert(part.k.end(), problem.k.begin() + begin, problem.k.begin() + end);
    part.v.insert(part.v.end(), problem.v.begin() + begin, problem.v.begin() + end);
  }
  return part;
}

PreparedArgs prepare_args(const AttentionProblem& problem, int64_t page_size,
                          AttentionResult& result) {
  const AttentionShape& shape = problem.shape;
  result.out.assign(static_cast<size_t>(shape.q_len * shape.num_heads * shape.head_dim), NAN);
  result.lse.assign(static_cast<size_t>(shape.q_len * shape.num_heads), NAN);
  PreparedArgs prepared;
  if (page_size == 0) {
    prepared.k_pages = {problem.k.data()};
    prepared.v_pages = {problem.v.data()};
    page_size = std::max<int64_t>(shape.kv_len, 1);
  } else {
    const int64_t d = shape.head_dim;
    for (int64_t first = 0; first < shape.kv_len; first += page_size) {
      const int64_t count = std::min(page_size, shape.kv_len - first);
      for (const auto* source : {&problem.k, &problem.v}) {
        std::vector<uint16_t> page(static_cast<size_t>(shape.num_kv_heads * page_size * d),
                                   kHalfNaN);
        for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
          std::copy_n(source->begin() + (h * shape.kv_len + first) * d, count * d,
                      page.begin() + h * page_size * d);
        }
        prepared.page_storage.push_back(std::move(page));
      }
    }
    for (size_t p = 0; p < prepared.page_storage.size(); p += 2) {
      prepared.k_pages.push_back(prepared.page_storage[p].data());
      prepared.v_pages.push_back(prepared.page_storage[p + 1].data());
    }
  }
  cpu::AttentionArgs& args = prepared.args;
  args.q = problem.q.data();
  args.out = result.out.data();
  args.lse = result.lse.data();
  args.q_row_stride = args.out_row_stride = shape.num_heads * shape.head_dim;
  args.kv = {prepared.k_pages, prepared.v_pages, page_size};
  args.q_len = shape.q_len;
  args.kv_len = shape.kv_len;
  args.num_heads = shape.num_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.softmax_scale = problem.softmax_scale;
  args.causal = shape.causal;
  return prepared;
}

AttentionResult run_attention(const AttentionProblem& problem, const AttentionSpec& spec) {
  AttentionResult result;
  const PreparedArgs prepared = prepare_args(problem, 0, result);
  cpu::attention(std::span(&prepared.args, 1), spec);
  return result;
}

}  // namespace sagelm::testing
