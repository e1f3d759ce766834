#include "engine/answer.h"

#include <algorithm>
#include <iterator>
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
  if (options.ignore_eos) {
    std::ranges::copy_if(end_ids_, std::back_inserter(banned_), [](int32_t id) { return id >= 0; });
  }
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

bool Answer::wants_token() {
  if (options_.max_tokens == 0) return end(StopReason::kMaxTokens);
  if (static_cast<int64_t>(ids_->size()) >= context_) return end(StopReason::kContextFull);
  return true;
}

TokenDraw Answer::next_draw(int64_t row, std::optional<int32_t> name) {
  TokenDraw draw = sampler_.next(*ids_, name);
  draw.row = row;
  draw.banned = banned_;
  return draw;
}

bool Answer::may_go_on() const {
  return drawn() + 1 < options_.max_tokens && static_cast<int64_t>(ids_->size()) + 1 < context_;
}

bool Answer::take(int32_t id) {
  if (std::find(end_ids_.begin(), end_ids_.end(), id) != end_ids_.end()) {
    return end(StopReason::kEndOfSequence);
  }
  ids_->push_back(id);
  result_->ids.push_back(id);
  if (!show(stream_.push(detokenizer_ ? detokenizer_->push(id) : std::string()))) {
    return end(StopReason::kCallback);
  }
  if (stream_.stopped()) return end(StopReason::kStopString);
  if (drawn() >= options_.max_tokens) return end(StopReason::kMaxTokens);
  if (static_cast<int64_t>(ids_->size()) >= context_) return end(StopReason::kContextFull);
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
