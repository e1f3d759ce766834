#include "engine/answer.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace sagelm {

Answer::Answer(const Of& model, const GenerateOptions& options, TextCallback on_text,
               std::vector<int32_t>& ids, Generation& result)
    : options_(options),
      on_text_(std::move(on_text)),
      ids_(&ids),
      result_(&result),
      context_(model.context),
      end_ids_(options.end_ids),
      sampler_(options.sampling),
      stream_(options.stop) {
  end_ids_.insert(end_ids_.end(), model.eos_ids.begin(), model.eos_ids.end());
  if (model.tokenizer != nullptr) detokenizer_.emplace(*model.tokenizer);
}

bool Answer::show(const std::string& text) {
  result_->text += text;
  return !on_text_ || on_text_(text);
}

bool Answer::end(StopReason reason) {
  result_->stop_reason = reason;
  return false;
}

bool Answer::take(std::span<float> logits) {
  const auto drawn = [this] { return static_cast<int64_t>(result_->ids.size()); };
  if (drawn() >= options_.max_tokens) return end(StopReason::kMaxTokens);
  if (static_cast<int64_t>(ids_->size()) >= context_) return end(StopReason::kContextFull);
  if (options_.ignore_eos) {
    for (const int32_t id : end_ids_) {
      if (id >= 0 && static_cast<size_t>(id) < logits.size()) {
        logits[static_cast<size_t>(id)] = -std::numeric_limits<float>::infinity();
      }
    }
  }
  const int32_t id = sampler_.sample(logits, *ids_);
  if (std::find(end_ids_.begin(), end_ids_.end(), id) != end_ids_.end()) {
    return end(StopReason::kEndOfSequence);
  }
  ids_->push_back(id);
  result_->ids.push_back(id);
  if (!show(stream_.push(detokenizer_ ? detokenizer_->push(id) : std::string()))) {
    return end(StopReason::kCallback);
  }
  if (stream_.stopped()) return end(StopReason::kStopString);
  if (drawn() == options_.max_tokens) return end(StopReason::kMaxTokens);
  return true;
}

void Answer::finish() {
  const std::string rest =
      stream_.push(detokenizer_ ? detokenizer_->flush() : std::string()) + stream_.finish();
  if (result_->stop_reason == StopReason::kCallback) {
    result_->text += rest;  // on_text wanted no more
  } else if (!rest.empty()) {
    show(rest);
  }
}

}  // namespace sagelm
