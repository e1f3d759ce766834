#include "engine/decoding.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace sagelm {
namespace {

// A step that was enqueued.
struct Step {
  std::vector<const DecodedAnswer*> of;  // by row; null: has ended since
  std::vector<int32_t> tokens;           // that run, or their names
  int32_t name = 0;                      // of the first token that is drawn

  bool is_wanted() const {
    return std::ranges::any_of(of, [](const DecodedAnswer* answer) { return answer != nullptr; });
  }
  std::vector<StepInput> inputs() const {
    std::vector<StepInput> inputs;
    for (size_t i = 0; i < of.size(); ++i) {
      if (of[i] != nullptr) {
        inputs.push_back({.sequence = of[i]->sequence, .tokens = {&tokens[i], 1}});
      }
    }
    return inputs;
  }
  // Answer's token has no business in its sequence.
  void take_back(const DecodedAnswer& answer) {
    const auto row = std::ranges::find(of, &answer);
    if (row == of.end()) return;
    answer.sequence->truncate(answer.sequence->length() - 1);
    *row = nullptr;
  }
};

void enqueue(Llama& llama, Step& step) {
  std::vector<TokenDraw> draws;
  for (size_t i = 0; i < step.of.size(); ++i) {
    const int32_t token = step.tokens[i];
    draws.push_back(step.of[i]->answer->next_draw(
        static_cast<int64_t>(i), is_token_name(token) ? std::optional(token) : std::nullopt));
  }
  step.name = llama.draw(step.inputs(), draws);
}

// The step behind one whose tokens are not known yet, if it can be taken back.
std::optional<Step> enqueue_ahead(Llama& llama, const Step& front) {
  Step step;
  std::vector<Sequence*> sequences;
  for (size_t i = 0; i < front.of.size(); ++i) {
    const DecodedAnswer* answer = front.of[i];
    if (answer == nullptr || !answer->answer->may_go_on()) continue;
    if (!answer->sequence->can_take_back(1)) return {};
    step.of.push_back(answer);
    step.tokens.push_back(front.name + static_cast<int32_t>(i));
    sequences.push_back(answer->sequence);
  }
  const std::vector<int64_t> counts(sequences.size(), 1);
  if (sequences.empty() || !Sequence::fit(sequences, counts)) return {};
  enqueue(llama, step);
  return step;
}

}  // namespace

void decode(Llama& llama, bool runs_ahead, std::span<const DecodedAnswer> answers,
            std::span<const int32_t> tokens) {
  Step next;
  const auto take = [&next](const DecodedAnswer& answer, int32_t token) {
    if (!answer.answer->take(token)) return false;
    next.of.push_back(&answer);
    next.tokens.push_back(token);
    return true;
  };
  for (size_t i = 0; i < answers.size(); ++i) take(answers[i], tokens[i]);
  if (next.of.empty()) return;
  enqueue(llama, next);
  while (next.is_wanted()) {
    Step step = std::exchange(next, {});
    std::optional<Step> ahead;
    if (runs_ahead) ahead = enqueue_ahead(llama, step);
    const std::vector<int32_t> drawn = llama.read_drawn(step.name, step.of.size());
    for (size_t i = 0; i < drawn.size(); ++i) {
      if (step.of[i] == nullptr || drawn[i] >= 0) continue;
      if (ahead) {
        for (const DecodedAnswer& answer : answers) ahead->take_back(answer);
      }
      llama.explain_not_finite(step.inputs());
    }
    for (size_t i = 0; i < drawn.size(); ++i) {
      if (step.of[i] == nullptr) continue;
      ++*step.of[i]->steps;
      if (!take(*step.of[i], drawn[i]) && ahead) ahead->take_back(*step.of[i]);
    }
    if (ahead) {
      next = std::move(*ahead);
    } else if (!next.of.empty()) {
      enqueue(llama, next);
    }
  }
}

}  // namespace sagelm
